"""R-KV (arXiv 2505.24133): importance against redundancy, `λI − (1 − λ)R`, as its authors' code
(github.com/Zefan-Cai/R-KV) has it; of key-value heads with several queries the mean attention is
taken, theirs is of the largest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View
from fewlines.schema import Odd, Positive, Share

SIMILAR = 0.5  # cosine beyond which a key makes another one redundant


@dataclass(frozen=True)
class RKV(ScoringPolicy):
    """The tokens of the last `window` queries are evicted last. Of those before them: `I`, the mean
    attention of these queries, max-pooled over `kernel` neighbours in raster order; `R`, the
    softmax of the mean cosine to the other keys, of which each forgives its latest likeness. A
    window is at most a line."""

    name: ClassVar[str] = "rkv"
    needs: ClassVar[Need | None] = "attention"
    window: Positive = 8
    kernel: Odd = 7
    share: Share = 0.1

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        window = min(self.window, view.geometry.width)
        recent = view.positions >= view.step - window
        votes = view.attention.masked_fill(recent[:, :, None], 0)  # of those before alone
        votes = votes / votes.sum(-1, keepdim=True).clamp(min=1e-30)
        importance = F.max_pool1d(votes.mean(2), self.kernel, stride=1, padding=self.kernel // 2)
        score = self.share * importance - (1 - self.share) * find_redundancy(view.keys)
        return torch.where(recent, 1.0 + view.positions, score)


def find_redundancy(keys: Tensor) -> Tensor:
    """Find how much of each key `(B, H, R, D)` others say: a distribution `(B, H, R)`."""
    unit = F.normalize(keys.float(), dim=-1)
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    order = torch.arange(cosine.shape[-1], device=cosine.device)
    latest = torch.where(cosine > SIMILAR, order, -1).amax(-1, keepdim=True)  # -1: nothing is alike
    cosine = cosine.scatter(
        -1, latest.clamp(min=0), cosine.gather(-1, latest.clamp(min=0)).where(latest < 0, 0)
    )
    return cosine.mean(-2).softmax(-1)
