"""The schedule, corrected by what this image shows: ours.

A resident is worth what the schedule expects of it, times a small power of how much the last
line's queries looked at it, compared with what they were expected to. Ranked once per line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View

FLOOR = 1e-6  # of a probability, so that a token that nobody looks at has a ratio


@dataclass(frozen=True)
class Corrected(ScoringPolicy):
    """`power` 0 is the schedule itself, by lines."""

    name: ClassVar[str] = "corrected"
    needs: ClassVar[Need | None] = "line_mean"
    calibrated: ClassVar[bool] = True
    power: float = 0.25

    def score(self, view: View) -> Tensor:
        assert view.expectation is not None
        queries = min(view.geometry.width, view.positions.shape[-1])
        expected = view.expectation.of_the_line(view, queries)
        ratio = (view.line_mean + FLOOR) / (expected + FLOOR)
        worth: Tensor = view.expectation.to_come(view) * ratio**self.power
        return worth
