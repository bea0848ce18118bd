"""What a caller gives to be drawn from: numbers, lists, NumPy arrays or tensors, as tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

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
    labels = _read_integers(given, "labels", spec.classes, f" ({spec.classes}: no class)")
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
    codes = _read_integers(given, "prompt", spec.codes - 1)
    if codes.ndim != 2 or len(codes) != images or codes.shape[1] > spec.n_tokens:
        raise FewlinesError(
            f"prompt: of shape {tuple(codes.shape)}; there are {images} labels, and an image has "
            f"{spec.n_tokens} tokens: write (n, k), n = {images}, k at most {spec.n_tokens}"
        )
    return codes


def read_count(given: Any, name: str, least: int) -> int:
    """Read a whole number that is at least `least`.

    Raises:
        FewlinesError: it is none; `name` says of what.
    """
    try:
        count = operator.index(given)
    except TypeError:
        count = least - 1
    if isinstance(given, bool) or count < least:
        raise FewlinesError(f"{name}: {given!r} is not a whole number of at least {least}")
    return count


def _read_integers(given: Any, name: str, most: int, more: str = "") -> Tensor:
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FewlinesError(f"{name}: not whole numbers ({error})") from None
    if found.numel() == 0:
        return found.long()
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = str(found.dtype).removeprefix("torch.")
        raise FewlinesError(f"{name}: {kind}, not whole numbers")
    found = found.long()
    if not 0 <= int(found.min()) <= int(found.max()) <= most:
        raise FewlinesError(f"{name} must lie in 0 … {most}{more}")
    return found
