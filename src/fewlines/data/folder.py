"""A folder of the user's own images: a class for every sub-folder, or one class if there is none.

The rule: every file with the extension of an image, at any depth, links followed, is a picture of
the sub-folder that it lies in. Hidden files and folders are no data. Pictures beside the folders of
classes, and files that are no pictures, are left out, which is said. Every image is brought onto
white, its short side resized to `side`, its middle cropped. A tenth of the files of each class,
chosen by their names, are the test set; of a class with few files, one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fewlines.data.images import ImageData, Stream
from fewlines.errors import FewlinesError
from fewlines.files import walk_files

Item = TypeVar("Item")

# What Pillow opens and knows how to read without another program.
SUFFIXES = {
    suffix
    for suffix, form in Image.registered_extensions().items()
    if form in Image.OPEN and form not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
}
TEST_SHARE = 10  # one in so many
SIDE = 64
AT_ONCE = 256  # pictures that wait for a thread


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Read the images under `path`.

    Raises:
        FewlinesError: no path, no such folder, no images in it, or one that cannot be read.
    """
    if path is None:
        raise FewlinesError("data.path: 'folder' needs the folder of your images")
    if not path.is_dir():
        raise FewlinesError(f"data.path: {path} is not a folder")
    side = SIDE if side is None else side
    folders = {each.name: image_files(each) for each in sorted(path.iterdir()) if each.is_dir()}
    by_class = {name: files for name, files in folders.items() if files and name[0] != "."}
    every = image_files(path)
    if not every:
        known = ", ".join(sorted(SUFFIXES))
        raise FewlinesError(f"data.path: {path} holds no images ({known})")
    by_class = by_class or {"image": every}
    labelled = [(file, label) for label, files in enumerate(by_class.values()) for file in files]
    _say_what_is_left_out(path, len(every) - len(labelled))
    test = []
    for name, files in by_class.items():
        if len(files) < 2:
            raise FewlinesError(
                f"data.path: the class '{name}' of {path} has {len(files)} image; training and "
                "test need one each: add images or take the folder away"
            )
        test += choose_test([file.relative_to(path) for file in files], TEST_SHARE)
    train, held_out = (_stream(part, side) for part in put_aside(labelled, test))
    return ImageData(train, held_out, list(by_class))


def put_aside(items: Sequence[Item], test: Sequence[bool]) -> tuple[list[Item], list[Item]]:
    """Put aside what is of the test set; returns the rest, and that."""
    pairs = list(zip(items, test, strict=True))
    return [each for each, held in pairs if not held], [each for each, held in pairs if held]


def refuse_some_classes(known: Iterable[tuple[Path, bool]]) -> None:
    """Refuse files of which some say the classes of their pictures and some do not.

    Raises:
        FewlinesError: some do; it names one of either.
    """
    found = {says: file for file, says in known}
    if len(found) > 1:
        raise FewlinesError(f"data.path: {found[True]} has classes and {found[False]} has none")


def _stream(labelled: Sequence[tuple[Path, int]], side: int) -> Stream:
    labels = torch.tensor([label for _, label in labelled])
    files, read = [file for file, _ in labelled], partial(read_picture, side=side)
    return Stream(labels, side, partial(read_all, files, read))


def read_all(items: Sequence[Item], read: Callable[[Item], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Read pictures in their order, by all threads, some at a time."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in range(0, len(items), AT_ONCE):
            yield from pool.map(read, items[first : first + AT_ONCE])


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder, at any depth, by name; links are followed, what is hidden is not."""
    return sorted(file for file in walk_files(folder) if file.suffix.lower() in SUFFIXES)


def _say_what_is_left_out(path: Path, beside: int) -> None:
    others = sum(file.suffix.lower() not in SUFFIXES for file in walk_files(path))
    if beside > 0:
        print(f"{path}: {beside} pictures beside the classes' folders left out", file=sys.stderr)
    if others:
        print(f"{path}: {others} files that are no pictures left out", file=sys.stderr)


def choose_test(names: Sequence[Path], one_in: int) -> list[bool]:
    """Choose which files of a class are its test images: one in so many, by their names, but at
    least one, and never all."""
    chosen = [share_of(name, one_in) for name in names]
    if any(chosen) != all(chosen):
        return chosen
    order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return [(name == order[0]) != all(chosen) for name in names]


def share_of(name: Path, one_in: int) -> bool:
    """Whether a file is of the part of all that its name's hash puts aside, one in so many."""
    return hashlib.sha256(os.fsencode(name.as_posix())).digest()[0] % one_in == 0


def open_on_white(file: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """The picture in a file, turned as its camera was held, without transparency.

    Args:
        file: its path, or its bytes.
        name: of it, where there is no path.

    Raises:
        FewlinesError: it cannot be read, or is too large to be one.
    """
    said = name or file
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(_in_eight_bits(opened, said)).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    except Image.DecompressionBombError:
        raise FewlinesError(f"{said} is too large for an image of a data set; remove it") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise FewlinesError(f"{said} cannot be read as an image ({error}); remove it") from None


def _in_eight_bits(image: Image.Image, file: object) -> Image.Image:
    """Sixteen bits scaled by their range, where Pillow would clip them."""
    if image.mode in ("I", "F") and image.format != "PNG":
        bits = "floats" if image.mode == "F" else "32-bit integers"
        raise FewlinesError(
            f"{file} holds {bits}, whose range it does not state; convert it to 8 or 16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image


def read_picture(file: Path | IO[bytes], side: int, name: str | None = None) -> torch.Tensor:
    """Read a picture `(3, side, side)` uint8; its arguments as of `open_on_white`."""
    fitted = ImageOps.fit(open_on_white(file, name), (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)
