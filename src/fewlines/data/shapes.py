"""Drawn shapes: four classes of grey 28×28 pictures that need no download, for tests and demos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fewlines.data.images import ImageData, Split, refuse_side
from fewlines.errors import FewlinesError

CLASSES = ("disc", "square", "cross", "stripes")
SIDE = 28


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Draw 2 000 training and 400 test pictures, always the same ones."""
    refuse_side("shapes", side)
    if path is not None:
        raise FewlinesError("data.path: 'shapes' are drawn, not read; leave the path out")
    return ImageData(_draw(2000, seed=0), _draw(400, seed=1), CLASSES, ["drawn on the spot"])


def _draw(count: int, seed: int) -> Split:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    row, column = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    images = np.empty((count, 1, SIDE, SIDE), np.uint8)
    for image, label in zip(images, labels, strict=True):
        dy, dx = random.uniform(-5, 5, 2)
        radius, bright = random.uniform(4, 9), random.uniform(120, 255)
        y, x = np.abs(row - dy), np.abs(column - dx)
        inside = np.maximum(x, y) < radius
        mask = (
            np.hypot(x, y) < radius,
            inside,
            inside & (np.minimum(x, y) < radius / 3),
            inside & (row // 2 % 2 == 0),
        )[label]
        image[0] = np.where(mask, bright, random.uniform(0, 20))
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
