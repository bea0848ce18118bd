"""Key norm (arXiv 2406.11430): keys of low norm draw attention and are retained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewlines.cache.policy import ScoringPolicy, View


@dataclass(frozen=True)
class KNorm(ScoringPolicy):
    """Score: a small norm of the key."""

    name: ClassVar[str] = "knorm"

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        norm: Tensor = view.keys.float().norm(dim=-1)
        return -norm
