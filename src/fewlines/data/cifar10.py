"""CIFAR-10 (Krizhevsky 2009): 50 000 + 10 000 colour images, 32×32, ten classes, by torchvision."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines.data.images import ImageData, Split, refuse_side
from fewlines.errors import FewlinesError


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Read `cifar-10-batches-py` under `path`, or download it; torchvision verifies both.

    Raises:
        FewlinesError: the files are missing or damaged, or cannot be fetched.
    """
    from torchvision.datasets import CIFAR10

    refuse_side("cifar10", side)
    root = path or Path("results/data/cifar10")
    try:
        train, test = (
            CIFAR10(str(root), train=part, download=path is None) for part in (True, False)
        )
    except (RuntimeError, OSError) as error:
        raise FewlinesError(
            f"CIFAR-10 is not complete in {root} ({error}); set data.path to the folder that holds "
            "cifar-10-batches-py"
        ) from None
    halves = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in (train, test)
    )
    return ImageData(next(halves), next(halves), train.classes)
