"""A random resident is evicted: the control that every rule must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import StaticPolicy, evict_one_by_one
from fewlines.geometry import Geometry, Table
from fewlines.schema import Count


@dataclass(frozen=True)
class Random(StaticPolicy):
    """Drawn once per layer and head from `seed`, the same for every image."""

    name: ClassVar[str] = "random"
    seed: Count = 0

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token."""
        random = np.random.default_rng(self.seed)

        def choose(layer: int, head: int, step: int, resident: list[int]) -> int:
            return resident[random.integers(len(resident))]

        return evict_one_by_one(geometry, capacity, choose)
