"""`paper.csv`: the paper's two rows, and ours beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fewlines.bench.cost import name_ratios
from fewlines.report.results import Results

# The paper's own table: GB, seconds per image, FID.
PUBLISHED = (
    ("Baseline (Full Cache)", 28.5, 15.2, 9.12),
    ("Proposed (Few Lines Cache)", 8.7, 4.8, 9.35),
)
GAIN = 1.05  # the least ratio that counts as less memory, or less time


def make_paper_table(results: Results) -> pd.DataFrame:
    """Make the paper's two rows, and ours below them: both full caches, and few lines before and
    after adaptation.

    Ratios stand in the row of few lines, beside what they say of the paper's three claims. Those of
    memory and time are full ÷ few lines, against the lean full cache, and against stock where a
    column says so; time has quartiles over interleaved repeats. That of FID is few lines ÷ the full
    cache of a model that was trained as long, with its extremes over seeds.
    """
    (_, memory, seconds, score), (_, few_memory, few_seconds, few_score) = PUBLISHED
    rows: list[dict[str, Any]] = [
        {
            "source": "paper",
            "cache": name,
            "process_bytes": gigabytes * 1e9,
            "seconds_per_image": time,
            "fid_mean": published,
        }
        for name, gigabytes, time, published in PUBLISHED
    ]
    rows[1] |= {
        "process_memory_ratio": memory / few_memory,
        "time_ratio": seconds / few_seconds,
        "fid_ratio": few_score / score,
    }
    cost = results.paper
    measured = {row["name"]: row for row in cost["rows"]}
    shared = {
        "source": "fewlines",
        "shape": results.experiment.name,
        "grid": "{}x{}".format(*results.load_network().spec.grid),
        "batch": cost["batch"],
        "dtype": cost["precision"],
        "storage": cost["storage"],
    }
    for model, slug in results.experiment.paper_rows:
        fid = results.read_sets(slug, model)["fid"]
        engines = {"stock": "full, stock", "full": "full, lean"} if slug == "full" else {slug: slug}
        for name, label in engines.items():
            if name not in measured:  # an engine that the family has not
                continue
            row = measured[name]
            made = {
                **shared,
                "model": model,
                "cache": label,
                "outcome": row["outcome"],
                "process_bytes": row["process_bytes"],
                "peak_bytes": row["peak_bytes"],
                "kv_bytes": row["kv_bytes"],
                "seconds_per_image": float(np.median(row["seconds"])) / cost["batch"],
                "fid_mean": fid.mean(),
                "fid_sd": fid.std(),
            }
            if slug != "full":
                made |= _compare_cost(measured["full"], row)
                if "stock" in measured:
                    made |= _compare_cost(measured["stock"], row, "_stock")
                made |= _compare_fid(results, model, fid)
                made |= judge_claims(made, rows[1])
            rows.append(made)
    return pd.DataFrame(rows)


def _compare_cost(full: dict[str, Any], few: dict[str, Any], against: str = "") -> dict[str, float]:
    return {
        f"process_memory_ratio{against}": full["process_bytes"] / few["process_bytes"],
        f"peak_memory_ratio{against}": full["peak_bytes"] / few["peak_bytes"],
        f"kv_memory_ratio{against}": full["kv_bytes"] / few["kv_bytes"],
        **name_ratios(f"time_ratio{against}", full["seconds"], few["seconds"]),
    }


def _compare_fid(results: Results, model: str, few: pd.Series[float]) -> dict[str, float]:
    """Compare the means, as every table does, and seed by seed for the extremes: the noise is the
    same in both."""
    experiment = results.experiment
    other = experiment.find_baseline(model)
    if other is None or (other, "full") not in experiment.paper_rows:
        return {}
    full = results.read_sets("full", other)["fid"]
    ratios = few / full
    return {
        "fid_ratio": few.mean() / full.mean(),
        "fid_ratio_low": ratios.min(),
        "fid_ratio_high": ratios.max(),
    }


def judge_claims(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    """Say of each of the paper's three claims whether it holds here: its whole factor, a part of
    it, or nothing of it; FID by the mean, and by the seeds where they disagree.

    Args:
        ours: a row of few lines, with its ratios.
        theirs: the paper's row of few lines.
    """

    def judge_gain(column: str) -> str:
        reached = ours[column]
        if np.isnan(reached):
            return "not compared: memory ran out"
        return "holds" if reached >= theirs[column] else "in part" if reached >= GAIN else "fails"

    verdict = {
        "memory_claim": judge_gain("process_memory_ratio"),
        "time_claim": judge_gain("time_ratio"),
    }
    if "fid_ratio" in ours:
        most = theirs["fid_ratio"]
        chance = ours["fid_ratio_low"] <= most <= ours["fid_ratio_high"]
        mean = "holds" if ours["fid_ratio"] <= most else "fails"
        verdict["fid_claim"] = f"{mean}, within chance" if chance else mean
    return verdict
