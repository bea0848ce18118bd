"""Tables as files, and as a reader wants them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fewlines.files import write_text

DIGITS = 6


def write_table(table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write CSV with everything, bytes to the last one; Markdown and LaTeX for reading."""
    counts = table.filter(regex="_bytes$")
    whole = table.assign(**{str(name): counts[name].round().astype("Int64") for name in counts})
    write_text(folder / f"{name}.csv", whole.to_csv(index=False, float_format=f"%.{DIGITS}g"))
    readable = make_readable(table)
    write_text(folder / f"{name}.md", readable.to_markdown(index=False) + "\n")
    latex = readable.to_latex(index=False, escape=True)
    write_text(folder / f"{name}.tex", latex)


def make_readable(table: pd.DataFrame) -> pd.DataFrame:
    """Make the columns a reader wants, in the units a reader wants, as text."""
    columns: dict[str, list[str]] = {}

    def column(title: str, source: str, form: str, scale: float | None = 1) -> None:
        if source in table:
            columns[title] = [
                "" if pd.isna(value) else form.format(value if scale is None else value * scale)
                for value in table[source]
            ]

    names = "source shape grid batch reference images space storage engine model policy cache "
    names += "budget outcome"
    for name in names.split():
        if name not in table:
            continue
        alike = table[name].nunique() == 1
        needless = "policy" in table and name in ("model", "storage")
        needless |= "engine" not in table and name in ("grid", "outcome")
        if not (alike and needless):
            column(name, name, "{:.0f}" if name == "batch" else "{}", None)
    column("capacity", "capacity", "{:.0f}")
    column("rank", "rank", "{:.0f}")
    column("place", "place", "{:.0f}")
    column("line", "line", "{:.0f}")
    column("ΔNLL below", "nll_delta_below", "{:g}")
    column("NLL", "nll", "{:.4f}")
    digits = 6 if "storage" in table and "policy" not in table else 4
    for title, source in (
        ("ΔNLL (95%)", "nll_delta"),
        ("ΔNLL to base+steps", "steps_delta"),
        (f"behind the {'best' if 'place' in table else 'one before'} (95%)", "behind"),
    ):
        if f"{source}_low" in table:
            columns[title] = [
                format_interval(row, source, f"+.{digits}f") for row in table.to_dict("records")
            ]
    column("KL", "kl", "{:.4f}")
    column("of it on the last line", "last_line", "{:.0%}")
    column("region", "region", "{}", None)
    column("attention", "attention", "{:.3f}")
    column("of one head, at most", "most", "{:.3f}")
    column("tokens", "tokens", "{:.1f}")
    column("count", "count", "{:.0f}")
    column("median distance", "median", "{:.4g}")
    column("a twentieth is nearer than", "twentieth", "{:.4g}")
    column("smallest", "smallest", "{:.4g}")
    column("caches", "caches", "{:.0f}")
    column("grids", "grids", "{}", None)
    column("points", "points", "{:.0f}")
    if "growth_low" in table:
        columns["grows with the width to the (95%)"] = [
            format_interval(row, "growth", ".2f") for row in table.to_dict("records")
        ]
    column("slope", "slope", "{:.2f}")
    column("measure", "measure", "{}", None)
    column("ρ", "spearman", "{:+.2f}")
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
    column("resident kB", "resident_bytes", "{:,.1f}", 1e-3)
    column("read kB", "read_bytes", "{:,.1f}", 1e-3)
    column("parameters", "parameters", "{:,.0f}")
    column("steps", "steps", "{:.0f}")
    column("minutes", "minutes", "{:.1f}")
    column("KV MB", "kv_bytes", "{:,.1f}", 1e-6)
    column("ms/image", "seconds_per_image", "{:,.2f}", 1e3)
    column("naive ms/image", "naive_seconds_per_image", "{:,.2f}", 1e3)
    column("× naive", "speedup_naive", "{:.1f}")
    column("roofline", "roofline_fraction", "{:.2f}")
    column("allowed", "speedup_bound", "{:.2f}")
    column("exponent of time", "time_exponent", "{:.2f}")
    column("that of the roofline", "roofline_exponent", "{:.2f}")
    column("exponent of memory", "memory_exponent", "{:.2f}")
    column("equal greedy tokens", "equal_tokens", "{:.1%}")
    column("× memory (process)", "process_memory_ratio", "{:.2f}")
    column("× memory (decode peak)", "peak_memory_ratio", "{:.2f}")
    column("× memory", "memory_saving", "{:.2f}")
    column("× memory vs stock", "process_memory_ratio_stock", "{:.2f}")
    column("× time", "time_ratio", "{:.2f}")
    column("× time, stock", "time_ratio_stock", "{:.2f}")
    column("× time vs lean", "speedup_lean", "{:.2f}")
    column("× time vs stock", "speedup_stock", "{:.2f}")
    column("FID ratio", "fid_ratio", "{:.3f}")
    for claim in ("memory", "time", "FID"):
        column(f"the paper's {claim}", f"{claim.lower()}_claim", "{}", None)
    return pd.DataFrame(columns)


def format_interval(row: Mapping[Any, Any] | pd.Series[Any], column: str, form: str) -> str:
    """Format `value (low … high)` of a column; nothing where it was not measured."""
    value, low, high = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
    return "" if pd.isna(value) else f"{value:{form}} ({low:{form}} … {high:{form}})"
