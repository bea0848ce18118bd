"""Keep every token: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, StaticPolicy
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Full(StaticPolicy):
    """Nobody is evicted."""

    name: ClassVar[str] = "full"

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token."""
        return np.full((*capacity.shape, geometry.n_tokens), NO_VICTIM)
