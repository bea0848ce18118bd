"""A random resident goes: the control that every rule must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import NOBODY, StaticPolicy


@dataclass(frozen=True)
class Random(StaticPolicy):
    """Drawn once per layer and head from `seed`, the same for every image."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def victims(self, geometry: Geometry, room: Table) -> Table:
        random = np.random.default_rng(self.seed)
        victims = np.full((*room.shape, geometry.n_tokens), NOBODY)
        for layer, head in np.ndindex(room.shape):
            resident: list[int] = []
            for step in range(geometry.n_tokens):
                if len(resident) == room[layer, head]:
                    chosen = int(random.integers(len(resident)))
                    victims[layer, head, step] = resident.pop(chosen)
                resident.append(step)
        return victims
