"""The one shape that every source of images is brought into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors


@dataclass(frozen=True)
class Split:
    """Images `(n, C, H, W)` uint8 and their class numbers `(n,)` int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise FewlinesError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def mixed(self) -> Split:
        """In another order, always the same: of folders read class by class, as the first images
        of a set stand for all of it wherever not all are needed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return Split(self.images[order], self.labels[order])


def refuse_side(source: str, side: int | None) -> None:
    """For sources whose images have one size."""
    if side is not None:
        raise FewlinesError(f"data.side: '{source}' has images of one size; leave the side out")


@dataclass(frozen=True)
class Size:
    """How much a source has: `train` and `test` images of `channels` and `side` `(H, W)`, in
    `classes`."""

    train: int
    test: int
    channels: int
    side: tuple[int, int]
    classes: int


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one source, and the names of its classes."""

    train: Split
    test: Split
    classes: Sequence[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {
            f"{name}_{part}": getattr(split, part)
            for name, split in (("train", self.train), ("test", self.test))
            for part in ("images", "labels")
        }
        write_tensors(path, tensors, {"classes": list(self.classes)})

    @classmethod
    def load(cls, path: Path) -> ImageData:
        """Read the file that `save` wrote.

        Raises:
            FewlinesError: it is no file of images.
        """
        tensors, header = read_tensors(path)
        try:
            train, test = (
                Split(tensors[f"{name}_images"], tensors[f"{name}_labels"])
                for name in ("train", "test")
            )
            return cls(train, test, header["classes"])
        except KeyError as missing:
            raise FewlinesError(f"{path} holds no {missing}: not a file of images") from None
