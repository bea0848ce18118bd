"""A folder of the user's own images: a class for every sub-folder, or one class if there is none.

Every image is brought onto white, its short side resized to `side`, its middle cropped. A tenth of
the files, chosen by their names, are the test set: adding a file moves no other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fewlines.data.images import ImageData, Split
from fewlines.errors import FewlinesError
from fewlines.progress import progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEST_SHARE = 10  # one in so many
SIDE = 64


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Read the images under `path`.

    Raises:
        FewlinesError: no path, no such folder, no images in it, or one that cannot be read.
    """
    if path is None:
        raise FewlinesError("data.path: 'folder' needs the folder of your images")
    if not path.is_dir():
        raise FewlinesError(f"data.path: {path} is not a folder")
    classes = sorted(
        folder.name for folder in path.iterdir() if folder.is_dir() and image_files(folder)
    )
    labelled = [
        (file, label) for label, name in enumerate(classes) for file in image_files(path / name)
    ]
    if not classes:
        labelled = [(file, 0) for file in image_files(path)]
    if not labelled:
        raise FewlinesError(f"data.path: {path} holds no images ({', '.join(sorted(SUFFIXES))})")
    test = [share_of(file.relative_to(path), TEST_SHARE) for file, _ in labelled]
    if all(test) or not any(test):
        raise FewlinesError(f"data.path: {path} holds {len(test)} images, too few for a test set")
    bar = progress(f"read {path.name}", len(labelled), "images")
    images = torch.empty(len(labelled), 3, side or SIDE, side or SIDE, dtype=torch.uint8)
    for number, (file, _) in enumerate(labelled):
        images[number] = _read(file, side or SIDE)
        bar.update()
    bar.close()
    held, labels = torch.tensor(test), torch.tensor([label for _, label in labelled])
    return ImageData(
        Split(images[~held], labels[~held]).mixed(),
        Split(images[held], labels[held]).mixed(),
        classes or ["image"],
    )


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder, at any depth, by name; hidden ones left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )


def share_of(name: Path, one_in: int) -> bool:
    """Whether a file is of the part of all that its name's hash puts aside, one in so many."""
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % one_in == 0


def open_on_white(file: Path) -> Image.Image:
    """The picture in a file, turned as its camera was held, without transparency.

    Raises:
        FewlinesError: it cannot be read, or is too large to be one.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    except Image.DecompressionBombError:
        raise FewlinesError(f"{file} is too large for an image of a data set; remove it") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise FewlinesError(f"{file} cannot be read as an image ({error}); remove it") from None


def _read(file: Path, side: int) -> torch.Tensor:
    """`(3, side, side)` uint8."""
    fitted = ImageOps.fit(open_on_white(file), (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)
