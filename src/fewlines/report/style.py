"""How figures look: one style in two themes, colours that colour-blind readers tell apart, names at
the end of each line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import pyplot as plt

from fewlines.files import replacing, write_text

mpl.use("Agg")
# Okabe and Ito's, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
STYLES = ("-", "--", "-.", ":")
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "axes.prop_cycle": cycler(color=COLOURS),
}
DARK = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#dddddd"
) | dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#15171a")
GAP = 11  # points between two names


def draw_themes(draw: Callable[..., None]) -> Callable[..., None]:
    """Draw a figure twice: at its `path`, and for dark pages at `…-dark`."""

    @wraps(draw)
    def draw_both(*arguments: Any) -> None:
        *given, path = arguments
        with mpl.rc_context(STYLE):
            draw(*given, path)
        with mpl.rc_context(STYLE | DARK):
            draw(*given, path.with_stem(f"{path.stem}-dark"))

    return draw_both


def save(figure: plt.Figure, path: Path, numbers: pd.DataFrame | None = None) -> None:
    """Write a picture and, under the same name, the numbers that it shows."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Software": None})
    plt.close(figure)
    if numbers is not None and not path.stem.endswith("-dark"):
        write_text(path.with_suffix(".csv"), numbers.to_csv(index=False, float_format="%.6g"))


def cycle_looks() -> Iterator[dict[str, str]]:
    """Cycle through the looks of lines: every colour, then every colour dashed, and so on."""
    while True:
        for style in STYLES:
            for colour in COLOURS:
                yield {"color": colour, "ls": style}


def clear_axis(axis: plt.Axes) -> None:
    """Take away all but what is drawn and the label: an axis of images has no scale."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def name_lines(axis: plt.Axes, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of each line beside the axes, at the height of its end, none upon another.

    Args:
        axis: where the lines are drawn.
        lines: of each the end `x`, `y`, the name and the colour.
    """
    axis.figure.draw_without_rendering()
    axis.figure.set_layout_engine("none")  # or it would move the axes away from the names
    point = axis.figure.dpi / 72
    ends = axis.transData.transform([(x, y) for x, y, _, _ in lines])
    order = np.argsort(ends[:, 1])
    low, high = axis.bbox.y0, axis.bbox.y1
    heights = np.clip(ends[order, 1], low, high)
    for index in range(1, len(heights)):  # upwards, then back down where that went too far
        heights[index] = max(heights[index], heights[index - 1] + GAP * point)
    over = (
        max(0.0, heights[-1] - max(high, low + GAP * point * len(heights))) if len(heights) else 0
    )
    heights = heights - over
    for index, height in zip(order, heights, strict=True):
        x, y, name, colour = lines[index]
        axis.annotate(
            name,
            (x, y),
            xytext=(axis.bbox.x1 + 14 * point, height),
            textcoords="figure pixels",
            color=colour,
            size=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.5,
                "alpha": 0.5,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )
