"""KeyDiff (arXiv 2504.15364): keys unlike the mean key are retained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import ScoringPolicy, View


@dataclass(frozen=True)
class KeyDiff(ScoringPolicy):
    """Score: how far a key's direction is from the mean key's."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        keys = F.normalize(view.keys.float(), dim=-1)
        return -F.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1)
