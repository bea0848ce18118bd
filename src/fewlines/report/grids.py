"""`grids.csv`: what a cache must hold as the grid grows, by the same caches on several grids.

A row of entries is a line, so on a grid `w` tokens wide a cache of `C` entries holds `C / w` lines
and a share `C / w²` of the image. We fit `log ΔNLL = a − b (log C − g log w)`: the same loss takes
`C ∝ w^g`. A number of tokens would suffice at `g = 0`, of lines at 1, a share of the image at 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from scipy import optimize, stats

from fewlines.errors import FewlinesError
from fewlines.files import parse
from fewlines.report.figures import name_row
from fewlines.report.style import COLOURS, draw_themes, save
from fewlines.report.tables import add_delta, drop_tasks

NEEDED = {"model", "policy", "budget", "grid", "capacity", "n_tokens", "nll_delta"}
SERIES = ["model", "policy"]
LEAST_POINTS = 4  # of a fit of three numbers
SHOWN = 6  # series of the figure: those that lose least
MEASURES = {"lines": "lines", "capacity": "entries of a head", "share": "share of the image"}


def read_grids(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the rows that lose anything from tables of the same pictures on several grids.

    Args:
        paths: of `cache.csv` or `likelihood.csv`, one of each grid.

    Returns:
        Columns `model`, `policy`, `budget`, `grid`, `width`, `capacity`, `lines`, `share`, and
        `delta` with its interval: against the full cache after as many steps.

    Raises:
        FewlinesError: a file is no such table.
    """
    tables = []
    for path in paths:
        table = parse(path, pd.read_csv, "a CSV table")
        if missing := sorted(NEEDED - set(table)):
            raise FewlinesError(f"{path} lacks the column {missing[0]}; a cache.csv has it")
        tables.append(add_delta(drop_tasks(table)))
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[(rows["delta_low"] > 0) & (rows["policy"] != "full")]
    width = rows["grid"].str.split("x").str[1].astype(int)
    shares = {"lines": rows["capacity"] / width, "share": rows["capacity"] / rows["n_tokens"]}
    rows = rows.assign(width=width, **shares)
    names = [*SERIES, "budget", "grid", "width", *MEASURES, "delta", "delta_low", "delta_high"]
    return rows[names].reset_index(drop=True)


def fit_growth(rows: pd.DataFrame) -> pd.DataFrame:
    """Fit how what is held must grow with the width of the grid, for the same loss.

    Args:
        rows: of `read_grids`.

    Returns:
        A row for each model and policy of two grids and four points at least: `growth`, the
        exponent `g`, with a 95% interval; `slope`, the exponent `b` of the loss; `level`, `a`.
    """
    found = []
    for series, group in rows.groupby(SERIES, sort=False):
        if group["grid"].nunique() < 2 or len(group) < LEAST_POINTS:
            continue
        # What an interval of ΔNLL is worth on a logarithmic scale.
        noise = (group["delta_high"] - group["delta_low"]) / 2 / 1.96 / group["delta"]
        (level, slope, widening), covariance = optimize.curve_fit(
            lambda x, level, slope, widening: level - slope * x[0] + widening * x[1],
            np.log([group["capacity"], group["width"]]),
            np.log(group["delta"]),
            p0=(0.0, 2.0, 2.0),
            sigma=noise,
        )
        growth, gradient = widening / slope, np.array([-widening / slope, 1.0]) / slope
        free = stats.t.ppf(0.975, len(group) - 3)
        reach = free * np.sqrt(gradient @ covariance[1:, 1:] @ gradient)
        found.append(
            {
                **dict(zip(SERIES, series, strict=True)),
                "grids": ", ".join(sorted(group["grid"].unique(), key=len)),
                "points": len(group),
                "growth": growth,
                "growth_low": growth - reach,
                "growth_high": growth + reach,
                "slope": slope,
                "level": level,
            }
        )
    names = ["grids", "points", "growth", "growth_low", "growth_high", "slope", "level"]
    return pd.DataFrame(found, columns=[*SERIES, *names])


def read_growth(path: Path) -> pd.DataFrame:
    """Read what `fit_growth` found.

    Raises:
        FewlinesError: the file is no `grids.csv`.
    """
    fits: pd.DataFrame = parse(path, pd.read_csv, "a CSV table")
    if missing := sorted({*SERIES, "grids", "growth", "slope", "level"} - set(fits)):
        raise FewlinesError(f"{path} lacks the column {missing[0]}; a grids.csv has it")
    return fits


def predict_capacities(fits: pd.DataFrame, width: int, delta: float) -> pd.DataFrame:
    """Say what each cache must hold on a square grid for a loss, by the fits of smaller ones.

    Args:
        fits: of `fit_growth`.
        width: tokens of a side.
        delta: ΔNLL, nats per token.

    Returns:
        Columns `model`, `policy`, `grids` that the fit is of, and `capacity` in entries of a head,
        `lines` and `share` of the image; the whole image where no cache is predicted to do. The
        smallest cache first.
    """
    wanted = np.exp((fits["level"] - np.log(delta)) / fits["slope"]) * width ** fits["growth"]
    capacity = np.ceil(wanted).clip(upper=width**2).astype(int)
    held = {"capacity": capacity, "lines": capacity / width, "share": capacity / width**2}
    found = fits[[*SERIES, "grids"]].assign(**held)
    ordered: pd.DataFrame = found.sort_values("capacity", kind="stable", ignore_index=True)
    return ordered


@draw_themes
def draw_grids(rows: pd.DataFrame, path: Path) -> None:
    """Draw ΔNLL against lines, against entries and against the share of the image: the curves of
    the grids lie upon each other where it is that which counts."""
    several = rows.groupby(SERIES).filter(lambda each: each["grid"].nunique() > 1)
    best = several.groupby(SERIES)["delta"].apply(lambda each: np.log(each).mean())
    series = dict(zip(best.sort_values().index[:SHOWN], COLOURS, strict=False))
    grids = sorted(several["grid"].unique(), key=lambda each: int(each.split("x")[1]))
    looks = dict(zip(grids, ("o-", "s--", "^:", "v-."), strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for (names, colour), (grid, look) in (
            (s, g) for s in series.items() for g in looks.items()
        ):
            of_series = (several[SERIES] == list(names)).all(axis=1) & (several["grid"] == grid)
            points = several[of_series].sort_values(measure)
            axis.plot(points[measure], points["delta"], look, color=colour, ms=4, lw=1.2)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes[0].set_ylabel("ΔNLL, nats/token")
    handles: list[Any] = [
        plt.Line2D([], [], color=colour, label=name_row(*names)) for names, colour in series.items()
    ]
    handles += [
        plt.Line2D([], [], color="grey", marker=look[0], ls=look[1:], label=f"{grid} tokens")
        for grid, look in looks.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7.5)
    save(figure, path, several)
