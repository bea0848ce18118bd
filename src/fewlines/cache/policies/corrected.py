"""The schedule, corrected by what this image shows: ours.

A resident is scored by what the schedule expects of it, times a power of how much the last line's
queries looked at it, compared with what they were expected to; the line's own tokens are worth
what the schedule expects. Asked once per line, it names the victim of each of the line's steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import LookaheadPolicy, Need, View
from fewlines.schema import Number, Rate


@dataclass(frozen=True)
class Corrected(LookaheadPolicy):
    """`power` 0 is the schedule itself. `floor` is added to both attentions: so little
    says nothing about a token. Both were chosen on training images of Fashion-MNIST."""

    name: ClassVar[str] = "corrected"
    needs: ClassVar[Need | None] = "line_mean"
    calibrated: ClassVar[bool] = True
    power: Number = 0.5
    floor: Rate = 0.01

    def score_ahead(self, view: View, steps: range) -> Tensor:
        """Score by the schedule, times the correction."""
        assert view.expectation is not None
        queries = self.interval(view.geometry, view.positions.shape[-1])
        expected = view.expectation.average_line(view, queries)
        ratio = (view.line_mean + self.floor) / (expected + self.floor)
        correction = F.pad(ratio**self.power, (0, len(steps)), value=1.0)  # (B, G, R + S)
        own = torch.arange(steps.start, steps.stop, device=ratio.device)
        positions = torch.cat([view.positions, own.expand(*ratio.shape[:2], -1)], dim=-1)
        score: Tensor = view.expectation.sum_future(positions, steps) * correction[:, :, None]
        return score
