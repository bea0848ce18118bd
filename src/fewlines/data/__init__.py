"""Where images come from: one file per source, each with `load(path) -> ImageData`."""

from __future__ import annotations

from fewlines.data import fashion_mnist, shapes
from fewlines.data.images import ImageData, Split

SOURCES = {"fashion-mnist": fashion_mnist.load, "shapes": shapes.load}

__all__ = ["SOURCES", "ImageData", "Split"]
