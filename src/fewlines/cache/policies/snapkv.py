"""SnapKV (arXiv 2404.14469): attention of the last queries, pooled over neighbouring positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View
from fewlines.schema import Odd, Positive


@dataclass(frozen=True)
class SnapKV(ScoringPolicy):
    """Score: the attention of the last `window` queries, averaged over `kernel` residents that are
    neighbours in raster order; the window's own tokens go last, and lend their neighbours none of
    theirs. A window is at most a line."""

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[Need | None] = "attention"
    window: Positive = 8
    kernel: Odd = 5

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        recent = view.positions >= view.step - min(self.window, view.geometry.width)
        votes = view.attention.mean(2).masked_fill(recent, 0)
        score = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(recent, 1.0 + view.positions, score)
