"""The one shape that every source of images is brought into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import filling_tensors, read_tensors
from fewlines.progress import progress


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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all images, `(n, C, H, W)`."""
        return tuple(self.images.shape)

    def fill(self, images: npt.NDArray[np.uint8]) -> None:
        """Put the images into an array of their shape."""
        images[:] = self.images.numpy()

    def mixed(self) -> Split:
        """In another order, always the same: of folders read class by class, as the first images
        of a set stand for all of it wherever not all are needed."""
        order = mix(len(self))
        return Split(self.images[order], self.labels[order])


def mix(count: int) -> Tensor:
    """Mix the numbers of so many images, always in the same way."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Stream:
    """A split whose images are read one after another, put in another order as `Split.mixed` does,
    and never all held where they are saved.

    Attributes:
        read_labels: class numbers `(n,)` int64, in the order in which they are read.
        side: pixels of a side; all have three channels.
        read: reads all images `(3, side, side)` uint8.
    """

    read_labels: Tensor
    side: int
    read: Callable[[], Iterator[Tensor]]

    def __len__(self) -> int:
        return len(self.read_labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all images, `(n, 3, side, side)`."""
        return (len(self), 3, self.side, self.side)

    @property
    def labels(self) -> Tensor:
        """Class numbers `(n,)`, of images as they are saved."""
        return self.read_labels[mix(len(self))]

    @cached_property
    def images(self) -> Tensor:
        """All images, held."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        self.fill(images.numpy())
        return images

    def fill(self, images: npt.NDArray[np.uint8]) -> None:
        """Read the images into an array of their shape."""
        bar = progress("read images", len(self), "images")
        for place, image in zip(mix(len(self)).argsort().tolist(), self.read(), strict=True):
            images[place] = image.numpy()
            bar.update()
        bar.close()


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
    """Training and test images of one source.

    Attributes:
        train, test: images.
        classes: their names.
        origins: what was read, with author and licence, where a source knows.
    """

    train: Split | Stream
    test: Split | Stream
    classes: Sequence[str] = field(default_factory=list)
    origins: Sequence[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        splits = {"train": self.train, "test": self.test}
        shapes = {f"{name}_images": split.shape for name, split in splits.items()}
        shapes |= {f"{name}_labels": (len(split),) for name, split in splits.items()}
        dtypes = {name: "I64" if name.endswith("labels") else "U8" for name in shapes}
        header = {"classes": list(self.classes), "origins": list(self.origins)}
        with filling_tensors(path, shapes, dtypes, header) as arrays:
            for name, split in splits.items():
                split.fill(arrays[f"{name}_images"])
                arrays[f"{name}_labels"][:] = split.labels.numpy()

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
            return cls(train, test, header["classes"], header.get("origins", []))
        except KeyError as missing:
            raise FewlinesError(f"{path} holds no {missing}: not a file of images") from None
