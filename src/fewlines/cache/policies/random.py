"""A random resident is evicted: the control that every rule must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, StaticPolicy
from fewlines.geometry import Geometry, Table
from fewlines.schema import Count


@dataclass(frozen=True)
class Random(StaticPolicy):
    """Drawn once per layer and head from `seed`, the same for every image."""

    name: ClassVar[str] = "random"
    seed: Count = 0

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose whom each image token evicts."""
        random = np.random.default_rng(self.seed)
        victims = np.full((*capacity.shape, geometry.n_tokens), NO_VICTIM)
        for layer, head in np.ndindex(capacity.shape):
            resident: list[int] = []
            for step in range(geometry.n_tokens):
                if len(resident) == capacity[layer, head]:
                    chosen = int(random.integers(len(resident)))
                    victims[layer, head, step] = resident.pop(chosen)
                resident.append(step)
        return victims
