"""The tables: `cache.csv`, every cache of the experiment, and `paper.csv`, beside the paper's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fewlines import machine
from fewlines.cache.policy import HindsightPolicy
from fewlines.config import BASE, AdaptedModel
from fewlines.files import write_text
from fewlines.measure.cost import ratio_interval
from fewlines.measure.likelihood import named_interval
from fewlines.report.efficiency import efficiency_table
from fewlines.report.results import Results

# The paper's own table: GB, seconds per image, FID.
PUBLISHED = (
    ("Baseline (Full Cache)", 28.5, 15.2, 9.12),
    ("Proposed (Few Lines Cache)", 8.7, 4.8, 9.35),
)
DIGITS = 6

MEASURES = ("fid", "kid", "is", "precision", "recall")


def cache_table(results: Results) -> pd.DataFrame:
    """One row per model and cache, in the order of the configuration. Bytes are bytes, times
    seconds, likelihoods nats per token, deltas against `full` of the same model. A row of
    `measure: likelihood` has no samples and no times."""
    rows = [_cache_row(results, model, slug) for model, slug in results.experiment.rows]
    return pd.DataFrame(rows)


def likelihood_table(results: Results) -> pd.DataFrame:
    """Likelihood alone, one row per model and cache: all that is needed to rank policies, in a
    fraction of the time."""
    rows = [
        {**_identity(results, *row), **_likelihood(results, *row), **_versus(results, *row)}
        for row in results.experiment.rows
    ]
    return pd.DataFrame(rows)


def rank_table(results: Results) -> pd.DataFrame:
    """The base model's caches of each budget, the best first, and how far each is behind the one
    before it: paired over images, so that ranks are told apart that intervals against the full
    cache do not tell apart."""
    rows = []
    by_budget: dict[str, list[str]] = {}
    for model, slug in results.experiment.rows:
        cache = results.experiment.cache(slug)
        if model == BASE and cache.budget is not None:
            by_budget.setdefault(cache.budget_text, []).append(slug)
    for budget, slugs in by_budget.items():
        found = {slug: torch.tensor(results.likelihood(slug)["nll_of_images"]) for slug in slugs}
        ordered = sorted(slugs, key=lambda slug: found[slug].mean().item())
        for rank, slug in enumerate(ordered):
            row = {
                "budget": budget,
                "rank": rank + 1,
                "policy": results.experiment.cache(slug).policy_text,
                "nll_delta": results.likelihood(slug)["nll_delta"],
            }
            if rank:
                row |= named_interval("behind", found[slug] - found[ordered[rank - 1]])
            rows.append(row)
    return pd.DataFrame(rows)


def _identity(results: Results, model: str, slug: str) -> dict[str, Any]:
    """What a row is about."""
    cache, geometry = results.experiment.cache(slug), results.geometry
    registers = _registers(results, model)
    return {
        "model": model,
        "policy": cache.policy_text,
        "budget": cache.budget_text,
        "capacity": geometry.prefix + registers + cache.tokens(geometry),
        "n_tokens": geometry.n_tokens,
    }


def _registers(results: Results, model: str) -> int:
    experiment = results.experiment
    return 0 if experiment.weights(model) == BASE else experiment.adapted(model).registers


def _likelihood(results: Results, model: str, slug: str) -> dict[str, float]:
    keys = ("nll", "nll_delta", "nll_delta_low", "nll_delta_high", "kl")
    return {key: results.likelihood(slug, model)[key] for key in keys}


def _versus(results: Results, model: str, slug: str) -> dict[str, float]:
    """How many images likelihood was measured on, and the paired difference to the full cache of
    the model that was trained for the same steps without a limit."""
    found = results.likelihood(slug, model)
    versus: dict[str, Any] = {"likelihood_images": found["images"]}
    if results.experiment.weights(model) == BASE:
        return versus
    adapted, baseline = results.experiment.adapted(model), results.experiment.baseline(model)
    versus |= {
        "extra_steps": results.experiment.continued(adapted).steps,
        "trained_for": _trained_for(adapted, slug),
        "start": adapted.start,
        "trained": adapted.trained,
        "distil": adapted.distil,
        "registers": adapted.registers,
    }
    if baseline:
        with_full = torch.tensor(results.likelihood("full", baseline)["nll_of_images"])
        versus |= named_interval("steps_delta", torch.tensor(found["nll_of_images"]) - with_full)
    return versus


def _trained_for(adapted: AdaptedModel, slug: str) -> str:
    """Whether a model was adapted to `this` cache alone, to `several`, or to `other` ones."""
    if slug not in adapted.caches:
        return "other"
    return "this" if len(adapted.caches) == 1 else "several"


def _cache_row(results: Results, model: str, slug: str) -> dict[str, Any]:
    drawn, timed = results.experiment.drawn(slug, model), results.experiment.shown(slug)
    quality = results.quality(slug, model) if drawn else {}
    sets = pd.DataFrame(quality.get("sets", []), columns=MEASURES)
    return {
        **_identity(results, model, slug),
        "samples": quality.get("samples", np.nan),
        "seeds": len(sets) or np.nan,
        **_likelihood(results, model, slug),
        **_over_seeds(sets),
        "kv_bytes": _kv_bytes(results, model, slug),
        **(_cost(results.cost(slug), slug) if timed else {}),
        **_versus(results, model, slug),
        "extractor": quality.get("extractor", ""),
    }


def _kv_bytes(results: Results, model: str, slug: str) -> float:
    """Keys and values of a batch of `cost.batch`, as the buffers hold them."""
    cache, shape, experiment = results.cache(slug), results.shape, results.experiment
    if isinstance(cache.policy, HindsightPolicy):
        return np.nan  # not a cache
    shape = replace(shape, registers=_registers(results, model))
    placement, storage = cache.place(shape.geometry), machine.DTYPES[experiment.storage]
    return experiment.cost.batch * placement.kv_bytes(shape.head_dim, storage)


def _cost(cost: dict[str, Any], slug: str) -> dict[str, Any]:
    """Memory and time of a cache: the same for all weights."""
    rows = {row["name"]: row for row in cost["rows"]}
    full, stock, this = rows["full"], rows["stock"], rows[slug]
    lean_ratio, lean_low, lean_high = ratio_interval(full["seconds"], this["seconds"])
    stock_ratio, stock_low, stock_high = ratio_interval(stock["seconds"], this["seconds"])
    return {
        "peak_bytes": this["peak_bytes"],
        "seconds_per_image": float(np.median(this["seconds"])) / cost["batch"],
        "speedup_lean": lean_ratio,
        "speedup_stock": stock_ratio,
        "memory_saving": full["peak_bytes"] / this["peak_bytes"],
        "speedup_lean_low": lean_low,
        "speedup_lean_high": lean_high,
        "speedup_stock_low": stock_low,
        "speedup_stock_high": stock_high,
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


def floor_table(results: Results) -> pd.DataFrame:
    """What a perfect model would reach, by the same instruments and as many images."""
    rows = []
    for name in ("real", "reconstruction"):
        sets = pd.DataFrame(results.floor(name)["sets"])
        rows.append(
            {
                "floor": name,
                "samples": results.floor(name)["samples"],
                **_over_seeds(sets),
            }
        )
    return pd.DataFrame(rows)


def paper_table(results: Results) -> pd.DataFrame:
    """The paper's two rows, and ours below them: both full caches and the few lines.

    Ratios of memory and time are full ÷ few lines, that of FID few lines ÷ full; ours stand in the
    row of the full cache that they compare with, with quartiles over interleaved repeats for time
    and the extremes over seeds for FID.
    """
    (_, memory, seconds, fid), (_, few_memory, few_seconds, few_fid) = PUBLISHED
    rows: list[dict[str, Any]] = [
        {
            "source": "paper",
            "cache": name,
            "process_bytes": gigabytes * 1e9,
            "seconds_per_image": time,
            "fid_mean": score,
        }
        for name, gigabytes, time, score in PUBLISHED
    ]
    rows[0] |= {
        "process_memory_ratio": memory / few_memory,
        "time_ratio": seconds / few_seconds,
        "fid_ratio": few_fid / fid,
    }
    cost = results.paper
    slug = cost["cache"]
    measured = {row["name"]: row for row in cost["rows"]}
    few = measured[slug]
    few_quality = pd.DataFrame(results.quality(slug)["sets"])["fid"]
    for name, label in (("stock", "full, stock"), ("full", "full, lean"), (slug, slug)):
        row = measured[name]
        quality = pd.DataFrame(results.quality(slug if name == slug else "full")["sets"])["fid"]
        rows.append(
            {
                "source": "fewlines",
                "shape": results.experiment.name,
                "grid": "{}x{}".format(*results.geometry.grid),
                "cache": label,
                "batch": cost["batch"],
                "process_bytes": row["process_bytes"],
                "peak_bytes": row["peak_bytes"],
                "kv_bytes": row["kv_bytes"],
                "seconds_per_image": float(np.median(row["seconds"])) / cost["batch"],
                "fid_mean": quality.mean(),
                "fid_sd": quality.std(),
            }
        )
        if name != slug:
            median, low, high = ratio_interval(row["seconds"], few["seconds"])
            ratios = few_quality.to_numpy() / quality.to_numpy()  # the same noise in both
            rows[-1] |= {
                "process_memory_ratio": row["process_bytes"] / few["process_bytes"],
                "peak_memory_ratio": row["peak_bytes"] / few["peak_bytes"],
                "kv_memory_ratio": row["kv_bytes"] / few["kv_bytes"],
                "time_ratio": median,
                "time_ratio_low": low,
                "time_ratio_high": high,
                "fid_ratio": ratios.mean(),
                "fid_ratio_low": ratios.min(),
                "fid_ratio_high": ratios.max(),
            }
    large = large_grids(efficiency_table(results.efficiency))
    return pd.concat([pd.DataFrame(rows), large], ignore_index=True)


def large_grids(table: pd.DataFrame) -> pd.DataFrame:
    """The same comparison at published shapes with random weights, so without a quality: of each
    grid and batch of `efficiency.csv`, both full caches and the first of the few-lines ones."""
    rows = []
    ours = table[table["engine"].isin(("lean", "stock"))]
    for _, setting in ours.groupby(["shape", "grid", "batch"], sort=False):
        measured = setting[setting["outcome"] == "ok"]
        few = measured[measured["policy"] != "full"].head(1)
        for _, row in pd.concat([setting[setting["policy"] == "full"], few]).iterrows():
            full = row["policy"] == "full"
            made = {
                "source": "fewlines",
                **row[["shape", "grid", "batch", "peak_bytes", "kv_bytes", "seconds_per_image"]],
                "cache": f"full, {row['engine']}" if full else f"{row['policy']}, {row['budget']}",
                "outcome": row["outcome"],
            }
            if full and row["outcome"] == "ok" and len(few):
                versus = few.iloc[0]
                made |= {
                    "peak_memory_ratio": row["peak_bytes"] / versus["peak_bytes"],
                    "kv_memory_ratio": row["kv_bytes"] / versus["kv_bytes"],
                    "time_ratio": versus[f"speedup_{row['engine']}"],
                    "time_ratio_low": versus[f"speedup_{row['engine']}_low"],
                    "time_ratio_high": versus[f"speedup_{row['engine']}_high"],
                }
            rows.append(made)
    return pd.DataFrame(rows)


def storage_table(results: Results) -> pd.DataFrame:
    """What keeping keys and values in 16 bits changes, against float32."""
    return pd.DataFrame(results.storage)


def write_table(table: pd.DataFrame, folder: Path, name: str) -> None:
    """CSV with everything, Markdown and LaTeX for reading."""
    write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format=f"%.{DIGITS}g"))
    readable = readable_table(table)
    write_text(folder / f"{name}.md", readable.to_markdown(index=False) + "\n")
    latex = readable.to_latex(index=False, escape=True)
    write_text(folder / f"{name}.tex", latex)


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """The columns a reader wants, in the units a reader wants, as text."""
    columns: dict[str, list[str]] = {}

    def column(title: str, source: str, form: str, scale: float | None = 1) -> None:
        if source in table:
            columns[title] = [
                "" if pd.isna(value) else form.format(value if scale is None else value * scale)
                for value in table[source]
            ]

    names = ("source", "shape", "grid", "batch", "floor", "storage", "engine", "model", "policy")
    for name in (*names, "cache", "budget", "outcome"):
        if name not in table:
            continue
        alike = table[name].nunique() == 1
        if not (alike and "policy" in table and name in ("model", "storage")):
            column(name, name, "{:.0f}" if name == "batch" else "{}", None)
    column("capacity", "capacity", "{:.0f}")
    column("rank", "rank", "{:.0f}")
    column("NLL", "nll", "{:.4f}")
    digits = 6 if "storage" in table and "policy" not in table else 4
    for title, source in (
        ("ΔNLL (95%)", "nll_delta"),
        ("ΔNLL to base+steps", "steps_delta"),
        ("behind the one before (95%)", "behind"),
    ):
        if f"{source}_low" in table:
            columns[title] = _with_interval(table, source, digits)
    column("KL", "kl", "{:.4f}")
    if "fid_sd" in table:
        columns["FID"] = [
            "" if pd.isna(mean) else f"{mean:.2f}" if pd.isna(sd) else f"{mean:.2f} ± {sd:.2f}"
            for mean, sd in zip(table["fid_mean"], table["fid_sd"], strict=True)
        ]
    column("KID", "kid_mean", "{:.4f}")
    column("IS", "is_mean", "{:.2f}")
    column("precision", "precision", "{:.3f}")
    column("recall", "recall", "{:.3f}")
    column("process MB", "process_bytes", "{:,.0f}", 1e-6)
    column("decode peak MB", "peak_bytes", "{:,.1f}", 1e-6)
    column("KV MB", "kv_bytes", "{:,.1f}", 1e-6)
    column("ms/image", "seconds_per_image", "{:,.2f}", 1e3)
    column("roofline", "roofline_fraction", "{:.2f}")
    column("allowed", "speedup_bound", "{:.2f}")
    column("exponent of time", "time_exponent", "{:.2f}")
    column("that of the roofline", "roofline_exponent", "{:.2f}")
    column("exponent of memory", "memory_exponent", "{:.2f}")
    column("equal greedy tokens", "equal_tokens", "{:.1%}")
    column("× memory (process)", "process_memory_ratio", "{:.2f}")
    column("× memory (decode peak)", "peak_memory_ratio", "{:.2f}")
    column("× memory", "memory_saving", "{:.2f}")
    column("× time", "time_ratio", "{:.2f}")
    column("× time vs lean", "speedup_lean", "{:.2f}")
    column("× time vs stock", "speedup_stock", "{:.2f}")
    column("FID ratio", "fid_ratio", "{:.3f}")
    return pd.DataFrame(columns)


def _with_interval(table: pd.DataFrame, column: str, digits: int) -> list[str]:
    """A difference and the ends of its interval; nothing where it was not measured."""
    ends = table[[column, f"{column}_low", f"{column}_high"]]
    return [
        "" if pd.isna(delta) else f"{delta:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"
        for delta, low, high in ends.itertuples(index=False)
    ]


def network_table(results: Results) -> pd.DataFrame:
    """How well the networks learned, and how close training came to the machine's rate."""
    tokenizer, model, test = map(
        results.metrics, ("tokenizer", f"{BASE}/model", f"{BASE}/model-test")
    )
    rows = [
        ("tokenizer", "mean squared error on [−1, 1], test", f"{tokenizer['mse']:.4f}"),
        ("tokenizer", "codes in use, test", f"{tokenizer['codes_used']:.1%}"),
        ("model", "parameters", f"{model['parameters']:,}"),
        ("model", f"nats/token, {test['images']:,} test images", f"{test['nll']:.4f}"),
    ]
    if results.experiment.quality.features == "classifier":
        accuracy = results.metrics("classifier")["accuracy"]
        rows.append(("classifier", "accuracy, test", f"{accuracy:.1%}"))
    if model["gemm_share"]:
        share = f"{model['gemm_share']:.0%} of {model['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s"
        rows.append(("model", f"training rate, {model['precision']}", share))
    return pd.DataFrame(rows, columns=["network", "measure", "value"])
