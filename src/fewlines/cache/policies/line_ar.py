"""LineAR (arXiv 2512.04857): first tokens and last lines are retained; of the middle, what the
last line looked at. What is evicted never returns.

Anchor size, recent size, how a line's queries are pooled and what is evicted where the pinned
do not fit are our reading: the paper's code is not published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fewlines.cache.policy import Anchors, Need, ScoringPolicy, View, count_anchors
from fewlines.geometry import Geometry, Table
from fewlines.schema import Number, Share


@dataclass(frozen=True)
class LineAR(ScoringPolicy):
    """Pins the first `anchor` tokens, a number or `auto` (see `count_anchors`), and the last
    `recent` lines; the others are scored by the attention of the last finished line's queries: its
    mean, its maximum, or that of the mean query, or that of all queries so far, each line's times
    `decay` (`pool`). Where capacity is short, the oldest of the last lines are evicted next, the
    anchors never: where a line is more than the rest of the capacity, it is asked more often."""

    name: ClassVar[str] = "line_ar"
    anchor: Anchors = 4
    recent: Number = 1
    pool: Literal["mean", "max", "query", "decayed"] = "mean"
    decay: Share = 0.5

    @property
    def needs(self) -> Need:  # type: ignore[override]
        """What `pool` makes a score of."""
        needs: dict[str, Need] = {
            "mean": "line_mean",
            "max": "line_max",
            "query": "line_query",
            "decayed": "total",
        }
        return needs[self.pool]

    def count_pinned(self, geometry: Geometry, capacity: Table) -> Table:
        """Count the anchors."""
        return count_anchors(self.anchor, geometry, capacity)

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        anchors = int(self.count_pinned(view.geometry, np.array(view.capacity)))
        score = self._attention(view)  # (B, H, R), at most 1
        window = view.step - round(self.recent * view.geometry.width)
        score = torch.where(view.positions < window, score, 1.0 + view.positions)
        return score.masked_fill(view.positions < anchors, torch.inf)

    def _attention(self, view: View) -> Tensor:
        if self.pool == "mean":
            return view.line_mean
        if self.pool == "max":
            return view.line_max
        if self.pool == "decayed":
            return view.total / max(1, view.step)
        keys = view.keys
        scores = view.line_query @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
        attention: Tensor = scores.softmax(-1).mean(2)
        return attention
