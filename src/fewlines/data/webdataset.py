"""A folder of tar archives, as WebDataset writes them: `0001.jpg` and `0001.cls` beside each other,
the picture and the number of its class, or no class at all.

Archives whose names begin with `test` or `val` are the test set; where there are none, a tenth of
the pictures, chosen by their names. Where each picture lies is read first, its bytes when it is
needed: the archives may be larger than memory. Pictures are fitted as those of a folder are.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fewlines.data.folder import (
    SIDE,
    SUFFIXES,
    TEST_SHARE,
    choose_test,
    put_aside,
    read_all,
    read_picture,
    refuse_some_classes,
)
from fewlines.data.images import ImageData, Stream
from fewlines.errors import FewlinesError
from fewlines.progress import progress

HELD_OUT = ("test", "val")


@dataclass(frozen=True)
class Member:
    """A picture: `size` bytes at `offset` of an `archive`, of a class, or of none where nothing
    says one; `name` is the archive's."""

    archive: Path
    name: str
    offset: int
    size: int
    label: int | None


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Find the pictures in the archives under `path`.

    Raises:
        FewlinesError: no path, no archives, or one that is damaged or holds no pictures.
    """
    if path is None:
        raise FewlinesError("data.path: 'webdataset' needs the folder of your .tar archives")
    archives = sorted(path.glob("*.tar")) if path.is_dir() else []
    if not archives:
        raise FewlinesError(f"data.path: {path} is no folder of .tar archives")
    bar = progress("index", len(archives), "archives")
    members: dict[bool, list[Member]] = {False: [], True: []}
    for archive in archives:
        members[archive.name.startswith(HELD_OUT)] += list_members(archive)
        bar.update()
    bar.close()
    train, test = members[False], members[True]
    refuse_some_classes((each.archive, each.label is not None) for each in (*train, *test))
    if train and not test:
        held = choose_test([Path(each.archive.stem, each.name) for each in train], TEST_SHARE)
        train, test = put_aside(train, held)
    if not (train and test):
        raise FewlinesError(
            f"data.path: the archives of {path} hold too few pictures to learn from"
        )
    classes = max(each.label or 0 for each in (*train, *test)) + 1
    learned, held_out = (_stream(each, SIDE if side is None else side) for each in (train, test))
    return ImageData(learned, held_out, [str(number) for number in range(classes)])


def list_members(archive: Path) -> Iterator[Member]:
    """List the pictures of an archive, each with the class of the file beside it.

    Raises:
        FewlinesError: it is damaged, or some pictures have a class and others none.
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for each in tar:
                stem, _, ending = each.name.rpartition(".")
                if each.isfile() and f".{ending.lower()}" in SUFFIXES:
                    pictures[stem] = each
                elif each.isfile() and ending == "cls":
                    content = tar.extractfile(each)
                    labels[stem] = int(content.read()) if content else 0
    except (tarfile.TarError, ValueError, OSError) as error:
        raise FewlinesError(f"{archive} is no whole archive of pictures ({error})") from None
    if labels and labels.keys() != pictures.keys():
        odd = min(labels.keys() ^ pictures.keys())
        raise FewlinesError(
            f"{archive}: '{odd}' has not both a picture and a class, as others have"
        )
    if min(labels.values(), default=0) < 0:
        raise FewlinesError(f"{archive}: classes are numbers from 0")
    for stem, each in pictures.items():
        yield Member(archive, each.name, each.offset_data, each.size, labels.get(stem))


def _stream(members: Sequence[Member], side: int) -> Stream:
    labels = torch.tensor([each.label or 0 for each in members])
    return Stream(labels, side, partial(read_all, members, partial(_read, side=side)))


def _read(member: Member, side: int) -> torch.Tensor:
    with member.archive.open("rb") as archive:
        archive.seek(member.offset)
        content = io.BytesIO(archive.read(member.size))
    return read_picture(content, side, f"{member.archive}: {member.name}")
