"""Where each head looks, and what a schedule lets it keep: a table and two pictures of a
calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt

from fewlines.cache.plan import EvictionPlan
from fewlines.calibration.data import Calibration, measure_offsets
from fewlines.report.style import draw_themes, save

UP, LEFT = 5, 6  # lines and columns that are shown


def average_by_offset(calibration: Calibration) -> npt.NDArray[np.float64]:
    """Average the attention `(L, H, UP + 1, 2·LEFT + 1)` to a token so many lines up and columns to
    the left or right, over the queries that have such a token."""
    up, left = (
        offset[:-1, :-1] for offset in measure_offsets(calibration.grid)
    )  # the last never asks
    shown = (up >= 0) & (up <= UP) & (abs(left) <= LEFT) & np.tri(len(up), dtype=bool)
    cell = (up * (2 * LEFT + 1) - left + LEFT)[shown]
    cells = (UP + 1) * (2 * LEFT + 1)
    count = np.bincount(cell, minlength=cells).clip(1)
    layers, heads = calibration.attention.shape[:2]
    asked = calibration.attention[:, :, :-1, :-1][:, :, shown]
    sums = [np.bincount(cell, head, minlength=cells) for head in asked.reshape(-1, len(cell))]
    means: npt.NDArray[np.float64] = np.stack(sums) / count
    return means.reshape(layers, heads, UP + 1, 2 * LEFT + 1)


def make_region_table(calibration: Calibration) -> pd.DataFrame:
    """Say what the queries of each line look at: the class, their own line, the line above, the
    first line, what else is at the left and the right edge, and the rest.

    `attention` is the mean over heads, columns and calibration images, `most` that of the head
    that looks there most, `tokens` how many tokens the region has, mean over the line.
    """
    height, width = calibration.grid
    line, column = np.divmod(np.arange(height * width), width)
    up, _ = measure_offsets(calibration.grid)
    seen = np.tri(len(line), dtype=bool)
    left = seen.copy()
    regions = {}
    for name, member in (
        ("own line", up == 0),
        ("line above", up == 1),
        ("first line", line == 0),
        ("left edge", column == 0),
        ("right edge", column == width - 1),
        ("elsewhere", seen),
    ):
        regions[name] = left & member
        left &= ~member
    asked = calibration.attention.astype(np.float64) * seen
    by_region = {name: (asked * inside).sum(-1) for name, inside in regions.items()}  # (L, H, N)
    by_region = {"class": 1 - asked.sum(-1), **by_region}
    tokens = {"class": np.ones(len(line)), **{name: x.sum(-1) for name, x in regions.items()}}
    rows = []
    for each in range(height):
        queries = line == each
        queries[-1] = False  # the last token is drawn, never asked
        for name, attention in by_region.items():
            heads = attention[..., queries].mean(-1)
            row = {"line": each + 1, "region": name, "attention": heads.mean()}
            rows.append({**row, "most": heads.max(), "tokens": tokens[name][queries].mean()})
    return pd.DataFrame(rows)


@draw_themes
def draw_heads(calibration: Calibration, plan: EvictionPlan, path: Path) -> None:
    """Draw, left of each pair, attention by offset, the query's own line at the bottom. Right:
    which tokens (across) are resident at which step (down)."""
    offsets = average_by_offset(calibration)
    layers, heads = offsets.shape[:2]
    figure, axes = plt.subplots(
        layers, 2 * heads, figsize=(2.2 * heads, 1.15 * layers), layout="constrained", squeeze=False
    )
    n = plan.geometry.n_tokens
    step, token = np.arange(n)[:, None], np.arange(n)
    for layer, head in np.ndindex(layers, heads):
        look, keep = axes[layer, 2 * head], axes[layer, 2 * head + 1]
        top = offsets[layer, head].max()
        look.imshow(offsets[layer, head][::-1], vmin=0, vmax=top, cmap="magma", aspect="auto")
        look.set_ylabel(f"layer {layer}\nhead {head}", size=5)
        resident = (token <= step) & (step < plan.evicted_at[layer, head])
        keep.imshow(resident, cmap="gray_r", aspect="auto", interpolation="nearest")
        capacity = int(plan.capacity[layer, head])
        keep.set_ylabel(f"{capacity} tokens", size=5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    index = pd.MultiIndex.from_product(
        [range(layers), range(heads), range(UP + 1), range(-LEFT, LEFT + 1)],
        names=["layer", "head", "lines_up", "columns_right"],
    )
    save(figure, path, pd.DataFrame({"attention": offsets.ravel()}, index).reset_index())
