"""TOVA (arXiv 2401.06104): what the last query alone attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewlines.cache.policy import Need, ScoringPolicy, View


@dataclass(frozen=True)
class Tova(ScoringPolicy):
    """Score: the attention of the last query."""

    name: ClassVar[str] = "tova"
    needs: ClassVar[Need | None] = "attention"

    def score(self, view: View) -> Tensor:
        """Score each resident."""
        return view.attention[:, :, -1]
