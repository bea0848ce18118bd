"""H2O (arXiv 2306.14048): what was attended to most, and half the capacity for the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View
from fewlines.schema import Share


@dataclass(frozen=True)
class H2O(ScoringPolicy):
    """Score: the attention of all queries so far; the last `recent` share of the residents is
    evicted last. Asked once per line, where the paper evicts at every step (`every=1`): our
    reading, as for all scoring policies here."""

    name: ClassVar[str] = "h2o"
    needs: ClassVar[Need | None] = "total"
    recent: Share = 0.5

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        window = view.step - round(self.recent * view.positions.shape[-1])
        total = view.total / max(1, view.step)  # below 1
        return torch.where(view.positions < window, total, 1.0 + view.positions)
