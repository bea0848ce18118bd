"""Where images come from: one file per source, each with `load(path, side) -> ImageData`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewlines.data import cifar10, clipart, emoji, fashion_mnist, folder, shapes
from fewlines.data.images import ImageData, Split

SOURCES: dict[str, Callable[[Path | None, int | None], ImageData]] = {
    "fashion-mnist": fashion_mnist.load,
    "cifar10": cifar10.load,
    "clipart": clipart.load,
    **emoji.SOURCES,
    "folder": folder.load,
    "shapes": shapes.load,
}

__all__ = ["SOURCES", "ImageData", "Split"]
