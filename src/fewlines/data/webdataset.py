"""A folder of tar archives, as WebDataset writes them: `0001.jpg` and `0001.cls` beside each other,
the picture and the number of its class, or no class at all. Pictures are fitted as those of a
folder are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fewlines.data.folder import SUFFIXES, read_all, read_picture
from fewlines.data.images import ImageData
from fewlines.data.packed import Picture, load_packed
from fewlines.errors import FewlinesError


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Find the pictures in the archives under `path`; see `load_packed`."""
    return load_packed("webdataset", ".tar", path, side, list_members, _read)


def list_members(archive: Path) -> Iterator[Picture]:
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
        yield Picture(archive, each.name, labels.get(stem), (each.offset_data, each.size))


def _read(members: Sequence[Picture], side: int) -> Iterator[Tensor]:
    return read_all(members, partial(_read_member, side=side))


def _read_member(member: Picture, side: int) -> Tensor:
    offset, size = member.place
    with member.file.open("rb") as archive:
        archive.seek(offset)
        content = io.BytesIO(archive.read(size))
    return read_picture(content, side, f"{member.file}: {member.name}")
