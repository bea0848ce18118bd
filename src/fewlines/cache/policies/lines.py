"""The raster window: the last tokens, a few lines of them, as the paper's text plainly reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, StaticPolicy
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Lines(StaticPolicy):
    """The oldest is evicted."""

    name: ClassVar[str] = "lines"

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token."""
        step = np.arange(geometry.n_tokens)
        capacity = capacity[..., None]
        return np.where(step < capacity, NO_VICTIM, step - capacity)
