"""Where images come from: one file per source, each with `load(path, side) -> ImageData`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewlines.data import cifar10, emoji, fashion_mnist, folder, parquet, shapes, webdataset
from fewlines.data.images import ImageData, Size, Split

SOURCES: dict[str, Callable[[Path | None, int | None], ImageData]] = {
    "fashion-mnist": fashion_mnist.load,
    "cifar10": cifar10.load,
    **emoji.SOURCES,
    "folder": folder.load,
    "webdataset": webdataset.load,
    "parquet": parquet.load,
    "shapes": shapes.load,
}

# Of sources that are always the same: for planning before they are fetched.
SIZES = {
    "fashion-mnist": Size(60000, 10000, 1, (28, 28), 10),
    "cifar10": Size(50000, 10000, 3, (32, 32), 10),
    "shapes": Size(2000, 400, 1, (28, 28), 4),
}

__all__ = ["SIZES", "SOURCES", "ImageData", "Size", "Split"]
