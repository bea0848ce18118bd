"""`neighbours.csv` and its figure: drawn images beside the training images nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from torch import Tensor

from fewlines.metrics.neighbours import Neighbours
from fewlines.report.figures import join_images
from fewlines.report.style import clear_axis, draw_themes, save

SHOWN, ROW = 20, 10  # drawn images, of them side by side


def make_neighbour_table(found: Mapping[str, Neighbours], images: Sequence[str]) -> pd.DataFrame:
    """Make a row for each set of images and each space that they are compared in: how far they are
    from the training image that is nearest.

    Args:
        found: of each space.
        images: of each image, the set that it is of.

    Returns:
        Columns `images`, `space`, `count`, and of the distances `median`, `twentieth` (a twentieth
        is nearer) and `smallest`.
    """
    rows = []
    for space, each in found.items():
        for name, distances in pd.Series(each.distances.numpy()).groupby(list(images), sort=False):
            rows.append(
                {
                    "images": name,
                    "space": space,
                    "count": len(distances),
                    "median": distances.median(),
                    "twentieth": distances.quantile(0.05),
                    "smallest": distances.min(),
                }
            )
    return pd.DataFrame(rows)


@draw_themes
def draw_neighbours(
    drawn: Tensor,
    nearest: Mapping[str, Tensor],
    distances: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw images, ten in a row, and below each the training image that is nearest, by each space.

    Args:
        drawn: `(n, C, H, W)` uint8.
        nearest: of each space the nearest images, of the same shape.
        distances: of each space, how far they are.
        path: of the picture.
    """
    strips = {"drawn": drawn, **{f"nearest by {space}": each for space, each in nearest.items()}}
    blocks = -(-len(drawn) // ROW)
    count = blocks * len(strips)
    figure, axes = plt.subplots(count, figsize=(8.6, 0.9 * count), layout="constrained")
    for number, axis in enumerate(axes):
        block, kind = divmod(number, len(strips))
        name, images = list(strips.items())[kind]
        part = images[block * ROW : (block + 1) * ROW]
        axis.imshow(join_images(part), cmap="gray_r" if part.shape[1] == 1 else None)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        clear_axis(axis)
    save(figure, path, pd.DataFrame(distances))
