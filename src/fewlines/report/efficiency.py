"""`efficiency.csv`: what was measured at published shapes, beside what the machine allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from fewlines import machine
from fewlines.bench.cost import pair_ratios
from fewlines.bench.efficiency import describe_host, find_largest_batch
from fewlines.cache.spec import make_cache
from fewlines.devices import Device
from fewlines.models.base import find_published
from fewlines.report.style import COLOURS, draw_themes, save

CAPS = (8, 24, 80)  # GB
KEYS = ["shape", "batch", "dtype", "storage", "engine", "policy", "budget"]


def make_efficiency_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Make one row per setting and row of it. Times are seconds per image, their median over
    repeats; speed-ups are medians of paired ratios to the full caches of the same setting, and what
    the roofline allows is beside them in `speedup_bound`."""
    rows = [row for result in results for row in _rows(result)]
    return pd.DataFrame(rows)


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    measured = {
        row["engine"]: row for row in result["rows"] if row["policy"] == "full" and row["seconds"]
    }
    lean, stock = measured.get("lean"), measured.get("stock")
    height, width = result["grid"]
    rows = []
    for row in result["rows"]:
        made = {
            "shape": result["shape"],
            "grid": f"{height}x{width}",
            "n_tokens": result["n_tokens"],
            "batch": row["batch"],
            "dtype": result["dtype"],
            "storage": row["storage"],
            "engine": row["engine"],
            "policy": row["policy"],
            "budget": row["budget"],
            "outcome": "ok" if row["seconds"] else row["outcome"],
            "repeats": len(row["seconds"]),
            "kv_bytes": row["kv_bytes"],
            "memory_cap": result["memory_cap"],
        }
        if row["seconds"]:
            made |= _measured(result, row) | _against(result, row, lean, stock)
        made |= {key: result[key] for key in ("processor", "instructions", "cores", "torch")}
        made["gpu"] = result.get("gpu")
        rows.append(made)
    return rows


def _device(result: dict[str, Any], row: dict[str, Any]) -> Device:
    return describe_host(result["probes"][str(row["batch"])], result["dtype"], row["batch"])


def bound_seconds(result: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Bound the seconds of an image: its linear layers at the best rate, its keys and values at the
    bandwidth."""
    device, probe = _device(result, row), result["probes"][str(row["batch"])]
    linear = probe["linear_flops"] / device.rate(row["batch"])
    read = row["mean_read_bytes"] / device.bandwidth
    steps = result["n_tokens"] / row["batch"]
    return linear * steps, read * steps


def _measured(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    low, median, high = np.quantile(row["seconds"], [0.25, 0.5, 0.75])
    linear, read = bound_seconds(result, row)
    device = _device(result, row)
    family, published = find_published(result["shape"])
    dtypes = (machine.DTYPES[result["dtype"]], machine.DTYPES[row["storage"]])
    shape = published.on(tuple(result["grid"]))
    cost = family.Cost(shape, row["batch"], make_cache("full"), *dtypes)
    small = cost.operators * device.operator * result["n_tokens"] / row["batch"]
    whole = row.get("full_run_seconds")
    return {
        "seconds_per_image": median,
        "seconds_low": low,
        "seconds_high": high,
        "images_per_second": 1 / median,
        "peak_bytes": row["peak_bytes"],
        "weight_bytes": cost.weight_bytes,
        "roofline_fraction": (linear + read) / median,
        "linear_seconds": linear,
        "read_seconds": read,
        "bandwidth": device.bandwidth,
        "linear_flops_per_second": device.rate(row["batch"]),
        "operator_seconds": device.operator,
        "predicted_seconds": linear + read + small,
        "predicted_peak_bytes": row["predicted_peak_bytes"],
        **{f"share_{name}": share for name, share in row.get("profile", {}).items()},
        "full_run_seconds": whole,
        "integration_error": None if whole is None else row["seconds"][0] / whole - 1,
    }


def _against(
    result: dict[str, Any],
    row: dict[str, Any],
    lean: dict[str, Any] | None,
    stock: dict[str, Any] | None,
) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for name, full in (("lean", lean), ("stock", stock)):
        if full is not None:
            pairs = min(len(full["seconds"]), len(row["seconds"]))
            median, low, high = pair_ratios(full["seconds"][:pairs], row["seconds"][:pairs])
            ratios |= {
                f"speedup_{name}": median,
                f"speedup_{name}_low": low,
                f"speedup_{name}_high": high,
                f"memory_saving_{name}": full["peak_bytes"] / row["peak_bytes"],
            }
    if lean is not None:
        ratios["speedup_bound"] = sum(bound_seconds(result, lean)) / sum(bound_seconds(result, row))
        ratios["bound_reached"] = ratios["speedup_lean"] / ratios["speedup_bound"]
    return ratios


def make_scaling_table(table: pd.DataFrame) -> pd.DataFrame:
    """Fit exponents of time, of what the roofline allows, and of memory in the number of tokens,
    fitted over the grids of each row that has three or more. A line is longer on a larger grid, so
    a cache of four lines grows too."""
    rows = []
    measured = table[(table["outcome"] == "ok") & table["memory_cap"].isna()]
    for keys, group in measured.groupby(KEYS, sort=False):
        if group["n_tokens"].nunique() >= 3:
            roofline = group["linear_seconds"] + group["read_seconds"]
            rows.append(
                {
                    **dict(zip(KEYS, keys, strict=True)),
                    "grids": ", ".join(group["grid"]),
                    "time_exponent": _exponent(group, group["seconds_per_image"]),
                    "roofline_exponent": _exponent(group, roofline),
                    "memory_exponent": _exponent(group, group["peak_bytes"]),
                }
            )
    exponents = ["time_exponent", "roofline_exponent", "memory_exponent"]
    return pd.DataFrame(rows, columns=[*KEYS, "grids", *exponents])


def _exponent(group: pd.DataFrame, cost: pd.Series) -> float:
    return float(np.polyfit(np.log(group["n_tokens"]), np.log(cost), 1)[0])


def make_caps_table(table: pd.DataFrame) -> pd.DataFrame:
    """Predict LlamaGen-B at 64×64 under a memory cap: the largest batch by exact bytes, and its
    images/s by the cost model of this machine, beside what was measured."""
    base = table[
        (table["shape"] == "llamagen-b")
        & (table["dtype"] == "float32")
        & table["bandwidth"].notna()
    ]
    if base.empty:
        return pd.DataFrame()
    rates = base.groupby("batch")["linear_flops_per_second"].median()
    device = Device(
        base["processor"].iloc[0],
        base["bandwidth"].median(),
        rates.max(),
        0,
        base["operator_seconds"].median(),
        dict(zip(rates.index.tolist(), rates.tolist(), strict=True)),
    )
    family, published = find_published("llamagen-b")
    shape = published.on((64, 64))
    rows = []
    for cap, (name, cache) in itertools.product(
        CAPS,
        (
            ("full, lean", make_cache("full")),
            ("streaming, 4 lines", make_cache("streaming", lines=4)),
        ),
    ):
        decode = family.Cost(shape, 1, cache, torch.float32, torch.float16)
        batch = find_largest_batch(decode, cap * 1e9)
        measured = base[(base["memory_cap"] == cap * 1e9) & (base["policy"] == cache.policy_text)]
        rows.append(
            {
                "cap, GB": cap,
                "cache": name,
                "largest batch": batch,
                "images/s, predicted": batch / replace(decode, rows=batch).predict(device),
                "images/s, measured": measured["images_per_second"].max(),
            }
        )
    return pd.DataFrame(rows)


@draw_themes
def draw_efficiency(table: pd.DataFrame, path: Path) -> None:
    """Draw time and memory against the number of tokens, speed-up against the batch, every row
    beside its roofline, and images/s under a memory cap. Colours are caches, markers precisions."""
    table = table[table["outcome"] == "ok"]
    table = table.assign(
        name=table["policy"].where(table["policy"] != "full", "full, " + table["engine"]),
        precision=table["dtype"].where(
            table["dtype"] == table["storage"], table["dtype"] + ", kept in " + table["storage"]
        ),
    )
    names, precisions = table["name"].unique(), table["precision"].unique()
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    markers = dict(zip(precisions, "os^vD", strict=False))
    given = table[table["memory_cap"].isna()]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    _draw_scaling(axes[0, 0], given, "seconds_per_image", 1, "s/image", colours, markers)
    _draw_scaling(axes[0, 1], given, "peak_bytes", 1e-9, "decode peak, GB", colours, markers)
    _draw_speedup(axes[1, 0], given, colours, markers)
    _draw_roofline(axes[1, 1], table, colours, markers)
    _draw_caps(axes[0, 2], table)
    axes[1, 2].axis("off")
    legend = [Line2D([], [], color=colours[name], label=name) for name in names]
    legend += [
        Line2D([], [], color="grey", ls="", marker=markers[kept], label=kept) for kept in precisions
    ]
    axes[1, 2].legend(handles=legend, loc="center", fontsize=8)
    save(figure, path)


def _most(table: pd.DataFrame, key: str, counted: str) -> tuple[str, int]:
    """The shape and `key` that have most different values of `counted`."""
    best = table.groupby(["shape", key])[counted].nunique().idxmax()
    shape, chosen = cast(tuple[str, int], best)
    return shape, chosen


def _lines(
    table: pd.DataFrame, colours: dict[str, Any], markers: dict[str, str]
) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """The rows of each cache and precision, and their style."""
    for keys, group in table.groupby(["name", "precision"], sort=False):
        name, precision = map(str, keys)
        yield group, {"color": colours[name], "marker": markers[precision], "ms": 4, "lw": 1}


def _draw_scaling(
    axis: plt.Axes,
    table: pd.DataFrame,
    column: str,
    scale: float,
    label: str,
    colours: dict[str, Any],
    markers: dict[str, str],
) -> None:
    """Of the shape and batch that have most grids, with the exponents fitted."""
    shape, batch = _most(table, "batch", "n_tokens")
    chosen = table[(table["shape"] == shape) & (table["batch"] == batch)]
    for group, style in _lines(chosen, colours, markers):
        group = group.sort_values("n_tokens")
        cost = group[column] * scale
        axis.plot(group["n_tokens"], cost, **style)
        if len(group) > 2:
            exponent = _exponent(group, cost)
            end = (group["n_tokens"].iloc[-1], cost.iloc[-1])
            axis.annotate(f" N^{exponent:.2f}", end, fontsize=6, color=style["color"])
    axis.set(xscale="log", yscale="log", xlabel="tokens of an image", ylabel=label)
    axis.set_title(f"{shape}, batch {batch}", size=9)


def _draw_speedup(
    axis: plt.Axes, table: pd.DataFrame, colours: dict[str, Any], markers: dict[str, str]
) -> None:
    """Of the shape and grid that have most batches, with what the roofline allows dashed."""
    few = table[(table["policy"] != "full") & table["speedup_lean"].notna()]
    if few.empty:
        axis.axis("off")
        return
    shape, tokens = _most(few, "n_tokens", "batch")
    few = few[(few["shape"] == shape) & (few["n_tokens"] == tokens)]
    for group, style in _lines(few, colours, markers):
        group = group.sort_values("batch")
        axis.plot(group["batch"], group["speedup_lean"], **style)
        axis.plot(group["batch"], group["speedup_bound"], "--", lw=1, color=style["color"])
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", xlabel="batch", ylabel="speed-up over full, lean (dashed: allowed)")
    axis.set_title(f"{shape}, {tokens} tokens", size=9)


def _draw_roofline(
    axis: plt.Axes, table: pd.DataFrame, colours: dict[str, Any], markers: dict[str, str]
) -> None:
    """Time that the roofline needs against the time measured: on the diagonal nothing is lost."""
    for group, style in _lines(table, colours, markers):
        roof = group["linear_seconds"] + group["read_seconds"]
        axis.plot(roof, group["seconds_per_image"], **{**style, "ls": ""})
    ends = table["seconds_per_image"].agg(["min", "max"])
    axis.plot(ends, ends, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="roofline, s/image", ylabel="measured, s/image")
    axis.set_title("all rows", size=9)


def _draw_caps(axis: plt.Axes, table: pd.DataFrame) -> None:
    caps = make_caps_table(table)
    if caps.empty:
        axis.axis("off")
        return
    for offset, (cache, rows) in zip((-0.2, 0.2), caps.groupby("cache", sort=False), strict=True):
        where = np.arange(len(rows)) + offset
        bars = axis.bar(where, rows["images/s, predicted"], width=0.38, label=f"{cache}, predicted")
        axis.bar_label(bars, [f"batch {batch}" for batch in rows["largest batch"]], fontsize=6)
        axis.plot(where, rows["images/s, measured"], "kx", ms=5)
    axis.plot([], [], "kx", label="measured")
    axis.set_xticks(range(len(CAPS)), [f"{cap} GB" for cap in CAPS])
    axis.set(xlabel="memory cap", ylabel="images/s")
    axis.set_title("llamagen-b, 4096 tokens", size=9)
    axis.set_ylim(top=1.3 * caps["images/s, predicted"].max())
    axis.legend(fontsize=6, loc="upper left")
