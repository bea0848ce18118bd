"""Fashion-MNIST (arXiv 1708.07747): 60 000 + 10 000 grey images, 28×28, ten classes, MIT licence.

Found or fetched, in this order: a folder that the user names, the files of the system's Debian
package, the same package downloaded and unpacked without root, torchvision's download.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewlines.data.debian import fetch_package
from fewlines.data.images import ImageData, Split, refuse_side
from fewlines.errors import FewlinesError

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PACKAGE = "dataset-fashion-mnist"
IN_PACKAGE = Path("usr/share/datasets/fashion-mnist")

# SHA-256 of the files once decompressed: distributors compress them differently.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Read the data set from `path`, or find it, or fetch it.

    Raises:
        FewlinesError: a file is missing or not the published one, or nothing could be fetched.
    """
    refuse_side("fashion-mnist", side)
    if path is not None:
        return _read(path)
    system = Path("/") / IN_PACKAGE
    if system.is_dir():
        return _read(system)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        sources: tuple[Callable[[Path], Path], ...] = (_from_debian, _from_torchvision)
        for fetch in sources:
            try:
                return _read(fetch(Path(folder)))
            except (FewlinesError, OSError, RuntimeError) as error:
                failures.append(f"{fetch.__name__.removeprefix('_from_')}: {error}")
    raise FewlinesError(
        "Fashion-MNIST could not be fetched (" + "; ".join(failures) + "); "
        f"install the package {PACKAGE}, or set data.path to a folder with its four .gz files"
    )


def _from_debian(folder: Path) -> Path:
    return fetch_package(PACKAGE, folder) / IN_PACKAGE


def _from_torchvision(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    print("fetching Fashion-MNIST by torchvision", file=sys.stderr)
    FashionMNIST(str(folder), download=True)
    return folder / "FashionMNIST" / "raw"


def _read(folder: Path) -> ImageData:
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / f"{name}.gz", checksum) for name, checksum in CHECKSUMS.items()
    )
    return ImageData(
        Split(train_images.unsqueeze(1), train_labels.long()),
        Split(test_images.unsqueeze(1), test_labels.long()),
        CLASSES,
        ["Fashion-MNIST, Zalando, MIT"],
    )


def _read_idx(path: Path, checksum: str) -> Tensor:
    """An IDX file: two zero bytes, type 8 (uint8), rank, sizes as big-endian uint32, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist; data.path needs the four .gz files") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FewlinesError(f"{path} is damaged ({error}); fetch it again") from None
    if hashlib.sha256(content).hexdigest() != checksum:
        raise FewlinesError(f"{path} is not the published file: its checksum differs")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(shape).copy())
