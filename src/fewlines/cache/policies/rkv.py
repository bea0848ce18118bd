"""R-KV (arXiv 2505.24133): importance against redundancy, `λI − (1 − λ)R`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View
from fewlines.schema import Odd, Positive, Share


@dataclass(frozen=True)
class RKV(ScoringPolicy):
    """`I`: mean attention of the last `window` queries, max-pooled over `kernel` neighbours in
    raster order; `R`: mean cosine similarity of a key to those of the other residents."""

    name: ClassVar[str] = "rkv"
    needs: ClassVar[Need | None] = "attention"
    window: Positive = 8
    kernel: Odd = 7
    share: Share = 0.1

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        importance = F.max_pool1d(
            view.attention.mean(2), self.kernel, stride=1, padding=self.kernel // 2
        )
        keys = F.normalize(view.keys.float(), dim=-1)
        others = max(1, keys.shape[2] - 1)
        redundancy = ((keys @ keys.sum(2).unsqueeze(-1)).squeeze(-1) - 1) / others
        return self.share * importance - (1 - self.share) * redundancy
