"""What a caller gives to be drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewlines.arguments import read_integers, read_tensor
from fewlines.errors import FewlinesError
from fewlines.models.base import Model, TokenSpec


def read_labels(given: Any, model: Model) -> Tensor:
    """Read class numbers: one, or a sequence of them.

    Args:
        given: an integer, or a list, array or tensor of them.
        model: that draws.

    Returns:
        `(n,)` int64.

    Raises:
        FewlinesError: they are no whole numbers, not one for each image, or out of range.
    """
    last, null = model.null_class - 1, model.has_null_class
    labels = read_integers(given, "labels", last + null, f" ({last + 1}: no class)" * null)
    labels = labels.reshape(1) if labels.ndim == 0 else labels
    if labels.ndim != 1:
        raise FewlinesError(
            f"labels: of shape {tuple(labels.shape)}; write one class number for each image, (n,)"
        )
    return labels


def read_conditions(given: Any, model: Model) -> Tensor | list[Tensor]:
    """Read what images are drawn from.

    Args:
        given: class numbers, see `read_labels`; or, of a model that draws from captions, their
            features: an array or tensor `(n, tokens, F)`, or a list of `(tokens, F)`.
        model: that draws.

    Returns:
        `(n,)` int64, or `n` tensors `(tokens, F)`.

    Raises:
        FewlinesError: they are not what this model draws from.
    """
    if not model.caption_dim:
        return read_labels(given, model)
    most, wanted = model.shape.prefix, model.caption_dim
    if not isinstance(given, Sequence) and getattr(given, "ndim", 0) == 0:
        raise FewlinesError(
            f"captions: this model draws from captions, not from {given!r}; write their features, "
            f"(tokens, {wanted}) for each image"
        )
    features = [read_tensor(each, "captions").float() for each in given]
    for each in features:
        if each.ndim != 2 or not 0 < len(each) <= most or each.shape[1] != wanted:
            raise FewlinesError(
                f"captions: features of shape {tuple(each.shape)}; write (tokens, {wanted}) for "
                f"each image, 1 … {most} tokens"
            )
        if not each.isfinite().all():
            raise FewlinesError("captions: features that are not finite")
    return features


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
