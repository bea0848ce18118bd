"""The one exception that a user is meant to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


class FewlinesError(Exception):
    """What was wrong, where, and what to write instead: one sentence, shown without a traceback."""


def look_up(name: str, known: Mapping[str, Value], what: str) -> Value:
    """Look up what a user named.

    Raises:
        FewlinesError: there is no such `what`; with those that there are.
    """
    if name not in known:
        raise FewlinesError(f"unknown {what} '{name}'; there are {', '.join(known)}")
    return known[name]
