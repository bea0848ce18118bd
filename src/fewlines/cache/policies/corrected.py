"""The schedule, corrected by what this image shows: ours.

A resident is worth what the schedule expects of it, times a power of how much the last line's
queries looked at it, compared with what they were expected to. Ranked once per line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View


@dataclass(frozen=True)
class Corrected(ScoringPolicy):
    """`power` 0 is the schedule itself, by lines. `floor` is added to both attentions: so little
    says nothing about a token. Both were chosen on training images of Fashion-MNIST."""

    name: ClassVar[str] = "corrected"
    needs: ClassVar[Need | None] = "line_mean"
    calibrated: ClassVar[bool] = True
    power: float = 0.5
    floor: float = 0.01

    def score(self, view: View) -> Tensor:
        assert view.expectation is not None
        queries = min(view.geometry.width, view.positions.shape[-1])
        expected = view.expectation.of_the_line(view, queries)
        ratio = (view.line_mean + self.floor) / (expected + self.floor)
        worth: Tensor = view.expectation.to_come(view) * ratio**self.power
        return worth
