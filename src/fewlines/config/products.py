"""Lists multiply: one line of `caches` can stand for many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any


def multiply(lines: object) -> object:
    """Multiply the lists in lines of `caches`; what is no such line is left to validation.

    A list under `policy`, `merge`, `allocation` or an option, a list of budgets, or of amounts
    (`budget: {lines: [3, 2]}`), stands for each of its values in turn.
    """
    if not isinstance(lines, list | tuple):
        return lines
    return [each for line in lines for each in multiply_line(line)]


def multiply_budgets(budgets: object) -> list[Any]:
    """Multiply the amounts of one budget or of several; what is none is left to validation."""
    several = budgets if isinstance(budgets, list | tuple) else [budgets]
    return [each for budget in several for each in _each_value(budget)]


def multiply_line(line: object) -> Iterator[object]:
    """Yield what one line of `caches` stands for."""
    if not isinstance(line, Mapping):
        yield line
        return
    choices: dict[str, list[Any]] = {
        key: list(value) if isinstance(value, list | tuple) else [value]
        for key, value in line.items()
        if key not in ("budget", "options")
    }
    if "budget" in line:
        choices["budget"] = multiply_budgets(line["budget"])
    if "options" in line:
        choices["options"] = _each_value(line["options"])
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _each_value(mapping: object) -> list[Any]:
    """`{a: [1, 2], b: 3}` → `{a: 1, b: 3}` and `{a: 2, b: 3}`."""
    if not isinstance(mapping, Mapping):
        return [mapping]
    several = [value if isinstance(value, list | tuple) else [value] for value in mapping.values()]
    return [dict(zip(mapping, values, strict=True)) for values in itertools.product(*several)]
