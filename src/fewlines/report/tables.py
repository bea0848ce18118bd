"""The tables of a run: `cache.csv`, every model and cache, its ranks, its floors, its networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from fewlines import machine
from fewlines.bench.cost import name_ratios
from fewlines.config import BASE
from fewlines.config.settings import AdaptedModel
from fewlines.metrics.likelihood import name_interval
from fewlines.report.results import Results

SAMPLE_MEASURES = ("fid_mean", "kid_mean", "is_mean", "precision", "recall")
REGIONS = (0.05, 0.01)  # nats/token


def make_cache_table(results: Results) -> pd.DataFrame:
    """Make one row per model and cache, in the order of the configuration. Bytes are bytes, times
    seconds, likelihoods nats per token, deltas against `full` of the same model. A row of
    `measure: likelihood` has no samples and no times."""
    rows = []
    for model, slug in results.experiment.rows:
        cost: dict[str, Any] = {"kv_bytes": _count_bytes(results, model, slug)}
        if results.experiment.is_shown(slug):
            cost |= _cost(results.read_cost(slug), slug)
        rows.append(_row(results, model, slug, cost))
    return pd.DataFrame(rows)


def drop_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows of tasks: whole images of a class remain."""
    rows: pd.DataFrame = table[table["task"].isna()] if "task" in table else table
    return rows


def is_base(table: pd.DataFrame) -> pd.Series[bool]:
    """Find the rows of the base model, its tasks too."""
    return (table["model"] == BASE) | table["model"].str.startswith(f"{BASE}:")


def add_delta(table: pd.DataFrame) -> pd.DataFrame:
    """Add `delta` and its interval: ΔNLL of the base model against its own full cache, of others
    against the full cache after as many steps."""
    deltas = {
        f"delta{end}": table[f"nll_delta{end}"].where(
            is_base(table), table.get(f"steps_delta{end}", np.nan)
        )
        for end in ("", "_low", "_high")
    }
    return table.assign(**deltas)


def make_likelihood_table(results: Results) -> pd.DataFrame:
    """Make one row of likelihood alone per model and cache: all that is needed to rank policies, in
    a fraction of the time."""
    rows = [
        {**_identify(results, *row), **_likelihood(results, *row), **_versus(results, *row)}
        for row in results.experiment.rows
    ]
    return pd.DataFrame(rows)


def make_quality_table(results: Results) -> pd.DataFrame:
    """Make the rows of likelihood and the measures of samples, of those that have samples: no
    times."""
    drawn = [row for row in results.experiment.rows if results.read_quality(row[1], row[0])]
    return pd.DataFrame([_row(results, *row, {}) for row in drawn])


def make_lines_table(results: Results) -> pd.DataFrame:
    """Make one row for each line of the image under each cache: where a small cache hurts."""
    rows = []
    for model, slug in results.experiment.rows:
        found, named = results.read_likelihood(slug, model), _identify(results, model, slug)
        by_line = zip(found["kl_by_line"], found["nll_delta_by_line"], strict=True)
        for line, (kl, delta) in enumerate(by_line, start=1):
            rows.append({**named, "line": line, "kl": kl, "nll_delta": delta})
    return pd.DataFrame(rows)


def make_correlation_table(table: pd.DataFrame) -> pd.DataFrame:
    """Correlate likelihood with the measures of samples, by ranks (Spearman's ρ), over the caches
    of the base model: of all, and of those that lose less than so many nats/token.

    Args:
        table: `cache.csv`; its caches that samples were drawn under count.
    """
    drawn = table[(table["model"] == BASE) & (table["policy"] != "full")]
    drawn = drawn.dropna(subset="fid_mean")
    rows = []
    for most in (np.inf, *REGIONS):
        within = drawn[drawn["nll_delta"] < most]
        for measure in SAMPLE_MEASURES:
            rho = within["nll_delta"].corr(within[measure], method="spearman")
            row = {"nll_delta_below": most, "caches": len(within), "measure": measure}
            rows.append({**row, "spearman": rho if len(within) > 2 else np.nan})
    return pd.DataFrame(rows)


def make_rank_table(results: Results) -> pd.DataFrame:
    """Rank the base model's caches of each budget, the best first, and how far each is behind the
    one before it: paired over images, so that ranks are told apart that intervals against the full
    cache do not tell apart."""
    rows = []
    by_budget: dict[str, list[str]] = {}
    for model, slug in results.experiment.rows:
        cache = results.experiment.get_cache(slug)
        if model == BASE and cache.budget is not None:
            by_budget.setdefault(cache.budget_text, []).append(slug)
    for budget, slugs in by_budget.items():
        found = {
            slug: torch.tensor(results.read_likelihood(slug)["nll_of_images"]) for slug in slugs
        }
        ordered = sorted(slugs, key=lambda slug: found[slug].mean().item())
        for rank, slug in enumerate(ordered):
            row = {
                "budget": budget,
                "rank": rank + 1,
                "policy": results.experiment.get_cache(slug).policy_text,
                "nll_delta": results.read_likelihood(slug)["nll_delta"],
            }
            if rank:
                row |= name_interval("behind", found[slug] - found[ordered[rank - 1]])
            rows.append(row)
    # All columns, also where no budget has two policies.
    names = ["budget", "rank", "policy", "nll_delta", "behind", "behind_low", "behind_high"]
    return pd.DataFrame(rows, columns=names)


def _identify(results: Results, model: str, slug: str) -> dict[str, Any]:
    """What a row is about."""
    cache, network = results.experiment.get_cache(slug), results.load_network(model)
    return {
        "model": model,
        "policy": cache.policy_text,
        "budget": cache.budget_text,
        "capacity": network.count_entries(cache),
        "n_tokens": network.spec.n_tokens,
    }


def _likelihood(results: Results, model: str, slug: str) -> dict[str, float]:
    keys = ("nll", "nll_delta", "nll_delta_low", "nll_delta_high", "kl")
    return {key: results.read_likelihood(slug, model)[key] for key in keys}


def _versus(results: Results, model: str, slug: str) -> dict[str, float]:
    """How many images likelihood was measured on, of which task, and the paired difference to the
    full cache of the model that was trained for the same steps without a limit."""
    found, task = results.read_likelihood(slug, model), results.experiment.get_task_name(model)
    versus: dict[str, Any] = {"likelihood_images": found["images"], "task": task}
    versus["grid"] = "{}x{}".format(*results.load_network(model).spec.grid)
    versus["nll_delta_but_last"] = float(
        np.mean([delta for delta in found["nll_delta_by_line"][:-1] if delta is not None])
    )
    if task or model == BASE:
        return versus
    adapted, baseline = (
        results.experiment.get_adapted(model),
        results.experiment.find_baseline(model),
    )
    versus |= {
        "extra_steps": results.experiment.get_training(adapted).steps,
        "trained_for": _trained_for(adapted, slug),
        "start": adapted.start,
        "trained": adapted.trained,
        "distil": adapted.distil,
        "lora_rank": adapted.rank,
        "registers": adapted.registers,
    }
    if baseline:
        with_full = torch.tensor(results.read_likelihood("full", baseline)["nll_of_images"])
        versus |= name_interval("steps_delta", torch.tensor(found["nll_of_images"]) - with_full)
    return versus


def _trained_for(adapted: AdaptedModel, slug: str) -> str:
    """Whether a model was adapted to `this` cache alone, to `several`, or to `other` ones."""
    if slug not in adapted.caches:
        return "other"
    return "this" if len(adapted.caches) == 1 else "several"


def _row(results: Results, model: str, slug: str, cost: dict[str, Any]) -> dict[str, Any]:
    """Likelihood; where there are samples, their measures, and what those are of: network of the
    features, temperature of the samples, and the images that they were compared with."""
    quality = results.read_quality(slug, model)
    sets = results.read_sets(slug, model)
    scores = _over_seeds(sets)
    return {
        **_identify(results, model, slug),
        "samples": quality.get("samples", np.nan),
        "seeds": len(sets) or np.nan,
        **_likelihood(results, model, slug),
        **scores,
        **cost,
        **_versus(results, model, slug),
        "fid_ratio": _compare_fid(results, model, scores["fid_mean"]),
        "extractor": quality.get("extractor", ""),
        "fid_note": _note_rank(quality),
        "temperature": quality.get("temperature", np.nan),
        "against": quality.get("against", ""),
    }


def _note_rank(quality: dict[str, Any]) -> str:
    """Where FID compares covariances that have not full rank."""
    if not quality:
        return ""
    fewest = quality["samples"]
    if not quality.get("statistics"):  # of how many images those are, their file does not say
        fewest = min(fewest, quality["reference_images"])
    if fewest > quality["dimensions"]:
        return ""
    return f"{fewest} images in {quality['dimensions']} dimensions: covariance of lower rank"


def _compare_fid(results: Results, model: str, fid: float) -> float:
    """FID ÷ that of the full cache: at the same task, or of the model that was trained as long by
    the same loss."""
    experiment = results.experiment
    if experiment.get_task(model):
        other: str | None = model if (model, "full") in experiment.rows else None
    else:
        other = experiment.find_baseline(model)
    if other not in dict(experiment.rows):
        return np.nan
    return fid / float(results.read_sets("full", other)["fid"].mean())


def _count_bytes(results: Results, model: str, slug: str) -> float:
    """What is kept of a batch of `cost.batch`."""
    experiment, cache = results.experiment, results.get_cache(slug)
    storage = machine.DTYPES[experiment.storage]
    return results.load_network(model).count_bytes(cache, experiment.cost.batch, storage)


def _cost(cost: dict[str, Any], slug: str) -> dict[str, Any]:
    """Memory and time of a cache: the same for all weights."""
    rows = {row["name"]: row for row in cost["rows"]}
    full, this = rows["full"], rows[slug]
    stock = rows.get("stock", {}).get("seconds", [np.nan] * len(this["seconds"]))
    ratios = name_ratios("speedup_lean", full["seconds"], this["seconds"])
    ratios |= name_ratios("speedup_stock", stock, this["seconds"])
    return {
        "peak_bytes": this["peak_bytes"],
        "seconds_per_image": float(np.median(this["seconds"])) / cost["batch"],
        "speedup_lean": ratios.pop("speedup_lean"),
        "speedup_stock": ratios.pop("speedup_stock"),
        "memory_saving": full["peak_bytes"] / this["peak_bytes"],
        **ratios,
        "outcome": this["outcome"],
        "cost_batch": cost["batch"],
        "arithmetic": cost["precision"],
        "storage": cost["storage"],
    }


def _over_seeds(sets: pd.DataFrame) -> dict[str, float]:
    """Mean quality of the sets of all seeds, and the spread of FID."""
    return {
        "fid_mean": sets["fid"].mean(),
        "fid_sd": sets["fid"].std(),
        "kid_mean": sets["kid"].mean(),
        "is_mean": sets["is"].mean(),
        "precision": sets["precision"].mean(),
        "recall": sets["recall"].mean(),
    }


def make_reference_table(results: Results) -> pd.DataFrame:
    """Make the reference scores: what a perfect model would reach, by the same instruments and as
    many images."""
    rows = []
    for name in ("real", "reconstruction"):
        sets = pd.DataFrame(results.read_reference(name)["sets"])
        rows.append(
            {
                "reference": name,
                "samples": results.read_reference(name)["samples"],
                **_over_seeds(sets),
                "fid_note": _note_rank(results.read_reference(name)),
            }
        )
    return pd.DataFrame(rows)


def make_storage_table(results: Results) -> pd.DataFrame:
    """Make a table of what keeping keys and values in 16 bits changes, against float32."""
    return pd.DataFrame(results.storage)


def make_network_table(results: Results) -> pd.DataFrame:
    """Make a table of how well the networks learned, and how close training came to the machine's
    rate."""
    tokenizer, model, test = map(
        results.read_metrics, ("tokenizer", f"{BASE}/model", f"{BASE}/model-test")
    )
    rows = [
        ("tokenizer", "mean squared error on [−1, 1], test", f"{tokenizer['mse']:.4f}"),
        ("tokenizer", "codes in use, test", f"{tokenizer['codes_used']:.1%}"),
        ("model", "parameters", f"{model['parameters']:,}"),
        ("model", f"nats/token, {test['images']:,} test images", f"{test['nll']:.4f}"),
    ]
    if results.experiment.quality.features == "classifier":
        accuracy = results.read_metrics("classifier")["accuracy"]
        rows.append(("classifier", "accuracy, test", f"{accuracy:.1%}"))
    if model["gemm_share"]:
        share = f"{model['gemm_share']:.0%} of {model['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s"
        rows.append(("model", f"training rate, {model['precision']}", share))
    return pd.DataFrame(rows, columns=["network", "measure", "value"])
