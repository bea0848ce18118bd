"""Arguments of the Python API: numbers, lists, NumPy arrays or tensors, as tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fewlines.errors import FewlinesError


def read_tensor(given: Any, name: str) -> Tensor:
    """Read numbers of any kind.

    Args:
        given: a number, or a list, array or tensor of them.
        name: of the argument, for the sentence.

    Raises:
        FewlinesError: they are no numbers, or no table of them.
    """
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FewlinesError(f"{name}: not numbers in a tensor, array or list ({error})") from None


def read_integers(given: Any, name: str, most: int, more: str = "") -> Tensor:
    """Read whole numbers from 0 on.

    Args:
        given: a number, or a list, array or tensor of them.
        name: of the argument, for the sentence.
        most: the largest that may be.
        more: added to the sentence that says so.

    Returns:
        int64, in the shape given.

    Raises:
        FewlinesError: they are no whole numbers, or out of range.
    """
    found = read_tensor(given, name)
    if found.numel() == 0:
        return found.long()
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = str(found.dtype).removeprefix("torch.")
        raise FewlinesError(f"{name}: {kind}, not whole numbers")
    found = found.long()
    if not 0 <= int(found.min()) <= int(found.max()) <= most:
        raise FewlinesError(f"{name} must lie in 0 … {most}{more}")
    return found


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
