"""`efficiency.csv`: what was measured at published shapes, beside what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from fewlines import machine
from fewlines.bench.cost import name_ratios
from fewlines.bench.efficiency import describe_host
from fewlines.cache.spec import make_cache
from fewlines.devices import Device
from fewlines.models.base import find_published
from fewlines.report.style import cycle_looks, draw_themes, save

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
            **{key: size for key, size in row.items() if key.startswith("batch_")},
        }
        if row["seconds"]:
            made |= _measured(result, row) | _against(result, row, lean, stock)
        made |= {key: result[key] for key in ("processor", "instructions", "cores", "torch")}
        made["gpu"] = result.get("gpu")
        made |= result.get("measured", {})
        rows.append(made)
    return rows


def _device(result: dict[str, Any], row: dict[str, Any]) -> Device:
    return describe_host(result["probes"][str(row["batch"])], result["dtype"])


def bound_seconds(result: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Bound the seconds of an image: its linear layers at the best rate, its keys and values at the
    bandwidth."""
    device, probe = _device(result, row), result["probes"][str(row["batch"])]
    linear = probe["linear_flops"] / device.flops
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
    small = cost.count_operators(device) * device.operator * result["n_tokens"] / row["batch"]
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
        "linear_flops_per_second": device.flops,
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
            taken = full["seconds"][:pairs], row["seconds"][:pairs]
            ratios |= name_ratios(f"speedup_{name}", *taken)
            ratios[f"memory_saving_{name}"] = full["peak_bytes"] / row["peak_bytes"]
    if lean is not None:
        ratios["speedup_bound"] = sum(bound_seconds(result, lean)) / sum(bound_seconds(result, row))
        ratios["bound_reached"] = ratios["speedup_lean"] / ratios["speedup_bound"]
    return ratios


def make_scaling_table(table: pd.DataFrame) -> pd.DataFrame:
    """Fit exponents of time, of what the roofline allows, and of memory in the number of tokens,
    fitted over the grids of each row that has three or more. A line is longer on a larger grid, so
    a cache of four lines grows too."""
    rows, stamps = [], [name for name in ("commit", "machine", "versions") if name in table]
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
                    **{name: "; ".join(sorted(set(group[name]))) for name in stamps},
                }
            )
    exponents = ["time_exponent", "roofline_exponent", "memory_exponent"]
    return pd.DataFrame(rows, columns=[*KEYS, "grids", *exponents, *stamps])


def _exponent(group: pd.DataFrame, cost: pd.Series) -> float:
    return float(np.polyfit(np.log(group["n_tokens"]), np.log(cost), 1)[0])


@draw_themes
def draw_efficiency(table: pd.DataFrame, path: Path) -> None:
    """Draw time and memory against the number of tokens, of the shape and batch that have most
    grids, and every row beside its roofline: on the diagonal nothing is lost."""
    table = table[(table["outcome"] == "ok") & table["memory_cap"].isna()]
    name = table["policy"].where(table["policy"] != "full", "full, " + table["engine"])
    table = table.assign(name=name + ", " + table["dtype"] + ", kept in " + table["storage"])
    looks = dict(zip(table["name"].unique(), cycle_looks(), strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    if table.empty:  # nothing ended well, or only where each row has a batch of its own
        axes[1].set_title("no rows of one batch were measured", size=9)
        save(figure, path, table)
        return
    shape, batch = cast(
        tuple[str, int], table.groupby(["shape", "batch"])["n_tokens"].nunique().idxmax()
    )
    chosen = table[(table["shape"] == shape) & (table["batch"] == batch)].sort_values("n_tokens")
    costs = (("seconds_per_image", 1.0, "seconds of an image"), ("peak_bytes", 1e-9, "peak, GB"))
    for axis, (column, scale, label) in zip(axes, costs, strict=False):
        for each, group in chosen.groupby("name"):
            axis.plot(group["n_tokens"], group[column] * scale, marker="o", ms=4, **looks[each])
        axis.set(xscale="log", yscale="log", xlabel="tokens of an image", ylabel=label)
        axis.set_title(f"{shape}, {batch} images at once", size=9)
    for each, group in table.groupby("name"):
        bound = group["linear_seconds"] + group["read_seconds"]
        colour = looks[str(each)]["color"]
        axes[2].plot(bound, group["seconds_per_image"], "o", ms=4, color=colour)
    ends = table["seconds_per_image"].agg(["min", "max"])
    axes[2].plot(ends, ends, color="grey", lw=0.8)
    axes[2].set(xscale="log", yscale="log", xlabel="roofline, s/image", ylabel="measured, s/image")
    axes[2].set_title("every row", size=9)
    handles = [Line2D([], [], **look, label=each) for each, look in looks.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)
    save(figure, path)
