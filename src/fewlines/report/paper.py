"""`paper.csv`: the paper's two rows, and ours beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fewlines.bench.cost import pair_ratios
from fewlines.report.efficiency import make_efficiency_table
from fewlines.report.results import Results

# The paper's own table: GB, seconds per image, FID.
PUBLISHED = (
    ("Baseline (Full Cache)", 28.5, 15.2, 9.12),
    ("Proposed (Few Lines Cache)", 8.7, 4.8, 9.35),
)


def make_paper_table(results: Results) -> pd.DataFrame:
    """Make the paper's two rows, and ours below them: both full caches and the few lines.

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
    few_quality = pd.DataFrame(results.read_quality(slug)["sets"])["fid"]
    for name, label in (("stock", "full, stock"), ("full", "full, lean"), (slug, slug)):
        row = measured[name]
        quality = pd.DataFrame(results.read_quality(slug if name == slug else "full")["sets"])[
            "fid"
        ]
        rows.append(
            {
                "source": "fewlines",
                "shape": results.experiment.name,
                "grid": "{}x{}".format(*results.load_network().spec.grid),
                "cache": label,
                "outcome": row["outcome"],
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
            median, low, high = pair_ratios(row["seconds"], few["seconds"])
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
    large = compare_large_grids(make_efficiency_table(results.efficiency))
    return pd.concat([pd.DataFrame(rows), large], ignore_index=True)


def compare_large_grids(table: pd.DataFrame) -> pd.DataFrame:
    """Make the same comparison at published shapes with random weights, so without a quality: of
    each grid and batch of `efficiency.csv`, both full caches and the first of the few-lines
    ones."""
    rows = []
    if table.empty:
        return table
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
