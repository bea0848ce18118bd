"""Colour clip art with classes: Debian's `openclipart-png`, public domain, 8 121 files of which
about 5 000 pictures are left, on white, in 22 classes.

Left out: duplicates, also those that differ by a shade; pictures that are tiny, huge or very long;
all but some of the folder of shapes, which holds a thousand circles. A fifth of the files, chosen
by their names, are the test set; training images come mirrored too.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fewlines.data.debian import fetch_package
from fewlines.data.folder import SIDE, image_files, open_on_white, share_of
from fewlines.data.images import ImageData, Split
from fewlines.errors import FewlinesError
from fewlines.progress import progress

PACKAGE = "openclipart-png"
IN_PACKAGE = Path("usr/share/openclipart/png")
TEST_SHARE = 5  # one in so many
SMALLEST, LARGEST, LONGEST = 24, 3000, 3.0  # pixels of the shorter side, the longer one, times it
LOOK_ALIKE = {"shapes": 250}  # pictures of a class that are enough
ALIKE = 8, 32  # pixels of a side, and shades between which two pictures count as one


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Read the pictures under `path`, a folder for every class, or find the package, or fetch it.

    Raises:
        FewlinesError: nothing could be found or fetched, or it holds too few pictures.
    """
    if path is not None:
        return _read(path, side or SIDE)
    system = Path("/") / IN_PACKAGE
    if system.is_dir():
        return _read(system, side or SIDE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpacked = fetch_package(PACKAGE, Path(folder))
        except (FewlinesError, OSError) as error:
            raise FewlinesError(
                f"clip art could not be fetched ({error}); install the package {PACKAGE}, "
                "or set data.path to its folder of classes"
            ) from None
        return _read(unpacked / IN_PACKAGE, side or SIDE)


def _read(root: Path, side: int) -> ImageData:
    if not root.is_dir():
        raise FewlinesError(f"data.path: {root} is not a folder")
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    files = [
        (file, label) for label, name in enumerate(classes) for file in image_files(root / name)
    ]
    seen: set[bytes] = set()
    kept = dict.fromkeys(range(len(classes)), 0)
    images: list[torch.Tensor] = []
    labels: list[int] = []
    test: list[bool] = []
    bar = progress("read clip art", len(files), "pictures")
    for file, label in files:
        bar.update()
        if not _usual(file):
            continue
        white = open_on_white(file)
        fitted = ImageOps.pad(white, (side, side), Image.Resampling.LANCZOS, color="white")
        signature = _signature(fitted)
        if signature in seen or kept[label] == LOOK_ALIKE.get(classes[label]):
            continue
        seen.add(signature)
        kept[label] += 1
        images.append(torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1))
        labels.append(label)
        test.append(share_of(file.relative_to(root), TEST_SHARE))
    bar.close()
    if all(test) or not any(test):
        raise FewlinesError(f"data.path: {root} holds {len(test)} pictures, too few for a test set")
    held, every, of = torch.tensor(test), torch.stack(images), torch.tensor(labels)
    train = every[~held]
    both = torch.cat([train, train.flip(-1)])
    mirrored = Split(both, of[~held].repeat(2))
    return ImageData(mirrored.mixed(), Split(every[held], of[held]).mixed(), classes)


def _usual(file: Path) -> bool:
    """Whether the size of a picture, which is read without its pixels, is none of the extremes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                short, long = sorted(opened.size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False
    except (OSError, SyntaxError):
        return True  # `open_on_white` says what is wrong with it
    return short >= SMALLEST and long <= min(LARGEST, LONGEST * short)


def _signature(picture: Image.Image) -> bytes:
    """The same for pictures that look alike, and seldom for others."""
    pixels, shades = ALIKE
    small = np.asarray(picture.resize((pixels, pixels), Image.Resampling.BOX))
    return (small // shades).tobytes()
