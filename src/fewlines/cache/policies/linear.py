"""LineAR (arXiv 2512.04857): first tokens and last lines stay; of the middle, what the last line
looked at. What is evicted never returns.

Anchor size, recent size, the mean over the line's queries and what goes where the pinned do not
fit are our reading: the paper's code is not published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewlines.cache.policy import ScoringPolicy, View


@dataclass(frozen=True)
class Linear(ScoringPolicy):
    """Pins the first `anchor` tokens and the last `recent` lines; the others are worth the mean
    attention of the last finished line's queries. Where room is short, the oldest of the last
    lines go next, the anchors never."""

    name: ClassVar[str] = "linear"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    anchor: int = 4
    recent: int = 1

    def score(self, view: View) -> Tensor:
        score = view.attention.mean(2)  # (B, H, R), at most 1
        window = view.step - self.recent * view.geometry.width
        score = torch.where(view.positions < window, score, 1.0 + view.positions)
        return score.masked_fill(view.positions < self.anchor, torch.inf)
