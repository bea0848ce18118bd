"""What a caller gives to be drawn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewlines.arguments import read_integers
from fewlines.errors import FewlinesError
from fewlines.models.base import TokenSpec


def read_labels(given: Any, spec: TokenSpec) -> Tensor:
    """Read class numbers: one, or a sequence of them.

    Args:
        given: an integer, or a list, array or tensor of them.
        spec: of the model that draws.

    Returns:
        `(n,)` int64.

    Raises:
        FewlinesError: they are no whole numbers, not one for each image, or out of range.
    """
    labels = read_integers(given, "labels", spec.classes, f" ({spec.classes}: no class)")
    labels = labels.reshape(1) if labels.ndim == 0 else labels
    if labels.ndim != 1:
        raise FewlinesError(
            f"labels: of shape {tuple(labels.shape)}; write one class number for each image, (n,)"
        )
    return labels


def read_prompt(given: Any, images: int, spec: TokenSpec) -> Tensor:
    """Read the codes that images begin with.

    Args:
        given: a list, array or tensor `(n, k)`; None begins with nothing.
        images: that are drawn, `n`.
        spec: of the model that draws.

    Returns:
        `(n, k)` int64.

    Raises:
        FewlinesError: they are no codes of this model, or not for these images.
    """
    if given is None:
        return torch.empty(images, 0, dtype=torch.long)
    codes = read_integers(given, "prompt", spec.codes - 1)
    if codes.ndim != 2 or len(codes) != images or codes.shape[1] > spec.n_tokens:
        raise FewlinesError(
            f"prompt: of shape {tuple(codes.shape)}; there are {images} labels, and an image has "
            f"{spec.n_tokens} tokens: write (n, k), n = {images}, k at most {spec.n_tokens}"
        )
    return codes
