"""`efficiency.csv`: what was measured at published shapes, beside what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from fewlines.files import replacing
from fewlines.measure.cost import ratio_interval
from fewlines.measure.efficiency import host
from fewlines.measure.operators import SMALL_OPERATORS, Device, weight_bytes
from fewlines.models.shapes import published_shape
from fewlines.report.figures import STYLE

KEYS = ["shape", "batch", "dtype", "storage", "engine", "policy", "budget"]


def efficiency_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per setting and row of it. Times are seconds per image, their median over repeats;
    speed-ups are medians of paired ratios to the full caches of the same setting, and what the
    roofline allows is beside them in `speedup_bound`."""
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
        rows.append(made)
    return rows


def _device(result: dict[str, Any], row: dict[str, Any]) -> Device:
    return host(result["probes"][str(row["batch"])], result["dtype"], row["batch"])


def roofline_seconds(result: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Of an image: its linear layers at the best rate, its keys and values at the bandwidth."""
    device, probe = _device(result, row), result["probes"][str(row["batch"])]
    linear = probe["linear_flops"] / device.rate(row["batch"])
    read = row["mean_read_bytes"] / device.bandwidth
    steps = result["n_tokens"] / row["batch"]
    return linear * steps, read * steps


def _measured(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    low, median, high = np.quantile(row["seconds"], [0.25, 0.5, 0.75])
    linear, read = roofline_seconds(result, row)
    device = _device(result, row)
    shape = published_shape(result["shape"])
    itemsize = 4 if result["dtype"] == "float32" else 2
    steps = result["n_tokens"] / row["batch"]
    small = SMALL_OPERATORS * shape.layers * device.operator * steps
    whole = row.get("full_run_seconds")
    return {
        "seconds_per_image": median,
        "seconds_low": low,
        "seconds_high": high,
        "images_per_second": 1 / median,
        "peak_bytes": row["peak_bytes"],
        "weight_bytes": weight_bytes(shape.on(result["grid"]), itemsize),
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
            median, low, high = ratio_interval(full["seconds"][:pairs], row["seconds"][:pairs])
            ratios |= {
                f"speedup_{name}": median,
                f"speedup_{name}_low": low,
                f"speedup_{name}_high": high,
                f"memory_saving_{name}": full["peak_bytes"] / row["peak_bytes"],
            }
    if lean is not None:
        ratios["speedup_bound"] = sum(roofline_seconds(result, lean)) / sum(
            roofline_seconds(result, row)
        )
        ratios["bound_reached"] = ratios["speedup_lean"] / ratios["speedup_bound"]
    return ratios


def scaling_table(table: pd.DataFrame) -> pd.DataFrame:
    """Exponents of time, of what the roofline allows, and of memory in the number of tokens, fitted
    over the grids of each row that has three or more. A line is longer on a larger grid, so a cache
    of four lines grows too."""
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


@mpl.rc_context(STYLE)
def draw_efficiency(table: pd.DataFrame, path: Path) -> None:
    """Time and memory against the number of tokens, speed-up against the batch, and how near each
    row is to the roofline."""
    table = table[table["outcome"] == "ok"]
    given = table[table["memory_cap"].isna()]
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    _draw_scaling(axes[0, 0], given, "seconds_per_image", 1, "seconds per image")
    _draw_scaling(axes[0, 1], given, "peak_bytes", 1e-9, "decode peak, GB")
    _draw_speedup(axes[1, 0], given)
    _draw_roofline(axes[1, 1], table)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def _label(keys: tuple[Any, ...]) -> str:
    shape, _, dtype, storage, engine, policy, budget = keys
    kept = dtype if dtype == storage else f"{dtype}/{storage}"
    cache = engine if policy == "full" else f"{policy} {budget}"
    return f"{shape}, {cache}, {kept}"


def _draw_scaling(
    axis: plt.Axes, table: pd.DataFrame, column: str, scale: float, label: str
) -> None:
    """Of the batch that has most grids."""
    batch = table.groupby("batch")["n_tokens"].nunique().idxmax()
    for keys, group in table[table["batch"] == batch].groupby(KEYS, sort=False):
        group = group.sort_values("n_tokens")
        axis.plot(group["n_tokens"], group[column] * scale, "o-", ms=3, lw=1, label=_label(keys))
    axis.set(
        xscale="log", yscale="log", xlabel="tokens of an image", ylabel=f"{label}, batch {batch}"
    )


def _draw_speedup(axis: plt.Axes, table: pd.DataFrame) -> None:
    """Of the grid that has most batches, with what the roofline allows as a dashed line."""
    tokens = table.groupby("n_tokens")["batch"].nunique().idxmax()
    few = table[(table["policy"] != "full") & (table["n_tokens"] == tokens)]
    groups = [key for key in KEYS if key != "batch"]
    for keys, group in few.dropna(subset="speedup_lean").groupby(groups, sort=False):
        group = group.sort_values("batch")
        label = _label((keys[0], None, *keys[1:]))
        (line,) = axis.plot(group["batch"], group["speedup_lean"], "o-", ms=3, lw=1, label=label)
        axis.plot(group["batch"], group["speedup_bound"], "--", lw=1, color=line.get_color())
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(
        xscale="log",
        xlabel=f"batch, {tokens} tokens",
        ylabel="speed-up over lean full (dashed: allowed)",
    )


def _draw_roofline(axis: plt.Axes, table: pd.DataFrame) -> None:
    """Time that the roofline needs against the time measured: on the diagonal nothing is lost."""
    for keys, group in table.groupby(["engine", "policy"], sort=False):
        roof = group["linear_seconds"] + group["read_seconds"]
        name = keys[0] if keys[1] == "full" else keys[1]
        axis.plot(roof, group["seconds_per_image"], "o", ms=4, label=f"roofline: {name}")
    ends = table["seconds_per_image"].agg(["min", "max"])
    axis.plot(ends, ends, color="grey", lw=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="roofline, seconds per image",
        ylabel="measured, seconds per image",
    )
