"""Pictures packed into files, tar archives and Parquet files alike: which of them are the test set.

Files whose names begin with `test` or `val` are; where there are none, a tenth of the pictures,
chosen by their names. Where each picture lies is read first, its bytes when it is needed: the files
may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewlines.data.folder import SIDE, TEST_SHARE, choose_test, put_aside, refuse_some_classes
from fewlines.data.images import ImageData, Stream
from fewlines.errors import FewlinesError
from fewlines.progress import progress

HELD_OUT = ("test", "val")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: the `file` that it is in, its `name` there, its class, or None where nothing says
    one, and what is needed to find it, its `place`."""

    file: Path
    name: str
    label: int | None
    place: Any


def load_packed(
    source: str,
    ending: str,
    path: Path | None,
    side: int | None,
    list_pictures: Callable[[Path], Iterator[Picture]],
    read: Callable[[Sequence[Picture], int], Iterator[Tensor]],
) -> ImageData:
    """Find the pictures in the files under a path.

    Args:
        source: its name, as `data.source` writes it.
        ending: of the files' names.
        path: the folder.
        side: that pictures are brought to, pixels.
        list_pictures: of a file.
        read: reads some of them, `(3, side, side)` uint8, in their order.

    Raises:
        FewlinesError: no path, no files, some with classes and some without, or too few pictures.
    """
    if path is None:
        raise FewlinesError(f"data.path: '{source}' needs the folder of your {ending} files")
    files = sorted(path.glob(f"*{ending}")) if path.is_dir() else []
    if not files:
        raise FewlinesError(f"data.path: {path} is no folder of {ending} files")
    pictures: list[Picture] = []
    with progress("index", len(files), "files") as bar:
        for file in files:
            pictures += list_pictures(file)
            bar.update()
    refuse_some_classes((each.file, each.label is not None) for each in pictures)
    held = [each.file.name.startswith(HELD_OUT) for each in pictures]
    if not any(held):
        held = choose_test([Path(each.file.stem, each.name) for each in pictures], TEST_SHARE)
    parts = put_aside(pictures, held)
    if not all(parts):
        raise FewlinesError(f"data.path: the files of {path} hold too few pictures to learn from")
    side = SIDE if side is None else side
    train, test = (
        Stream(torch.tensor([each.label or 0 for each in part]), side, partial(read, part, side))
        for part in parts
    )
    classes = max(each.label or 0 for each in pictures) + 1
    return ImageData(train, test, [str(number) for number in range(classes)])
