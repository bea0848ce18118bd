"""The images that others resemble most: does a model draw, or does it remember?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewlines.metrics.features import Features
from fewlines.metrics.quality import Images, resize
from fewlines.progress import progress

BATCH = 500  # images that are looked at at once
SPACES = PIXELS, FEATURES = ("pixels", "features")


@dataclass(frozen=True)
class Neighbours:
    """Attributes: `rows` `(n,)` of the nearest image to each, `distances` `(n,)` from it."""

    rows: Tensor
    distances: Tensor


def find_neighbours(
    images: Images, among: Images, features: Features, side: int | None = None
) -> dict[str, Neighbours]:
    """Find the nearest image to each, by the root mean square of what pixels (0 … 1) differ in, and
    by the Euclidean distance of features, as precision and recall measure it.

    Args:
        images: `(n, C, H, W)` uint8, whose pixels are all held.
        among: `(m, C, H, W)` uint8, in which it is looked for; a batch is held at a time.
        features: of a network.
        side: that images are brought to before features are computed.
    """
    parts = [_embed(batch, features, side) for _, batch in _batches(images)]
    wanted = {space: torch.cat([part[space] for part in parts]) for space in SPACES}
    nowhere = torch.zeros(len(images), dtype=torch.int64)
    best = dict.fromkeys(SPACES, Neighbours(nowhere, torch.full((len(images),), torch.inf)))
    with progress("compare", len(among), "images") as bar:
        for first, batch in _batches(among):
            for space, each in _embed(batch, features, side).items():
                best[space] = _nearer(best[space], wanted[space], each, first)
            bar.update(len(batch))
    return best


def _nearer(best: Neighbours, wanted: Tensor, found: Tensor, first: int) -> Neighbours:
    rows = torch.cdist(wanted, found).argmin(1)
    distances = (wanted - found[rows]).norm(dim=1)  # exact, unlike those of a matrix product
    nearer = distances < best.distances
    return Neighbours(
        torch.where(nearer, rows + first, best.rows),
        torch.where(nearer, distances, best.distances),
    )


def _batches(images: Images) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(images), BATCH):
        rows = list(range(first, min(first + BATCH, len(images))))
        yield first, images[rows]


def _embed(images: Tensor, features: Features, side: int | None) -> dict[str, Tensor]:
    flat = images.flatten(1).float() / 255
    resized = images if side is None else resize(images, side)
    return {PIXELS: flat / flat.shape[1] ** 0.5, FEATURES: features.network(resized)[0]}
