"""VATP (arXiv 2406.12335): attention weighs as much as the value that it brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewlines.cache.policy import Anchors, Need, ScoringPolicy, View, count_anchors
from fewlines.geometry import Geometry, Table
from fewlines.schema import Share


@dataclass(frozen=True)
class VATP(ScoringPolicy):
    """Score: the attention of all queries so far times the l1 norm of the value; the last `recent`
    share of the residents is evicted last, and the first `sinks` tokens never: sinks have values of
    small norm, which is why the paper pins them."""

    name: ClassVar[str] = "vatp"
    needs: ClassVar[Need | None] = "total"
    recent: Share = 0.5
    sinks: Anchors = 4

    def count_pinned(self, geometry: Geometry, capacity: Table) -> Table:
        """Count the sinks."""
        return count_anchors(self.sinks, geometry, capacity)

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        sinks = int(self.count_pinned(view.geometry, np.array(view.capacity)))
        window = view.step - round(self.recent * view.positions.shape[-1])
        score = view.total * view.values.norm(p=1, dim=-1)
        score = score / score.amax(-1, keepdim=True).clamp(
            min=1e-30
        )  # in the same order, at most 1
        score = torch.where(view.positions < window, score, 2.0 + view.positions)
        return score.masked_fill(view.positions < sinks, torch.inf)
