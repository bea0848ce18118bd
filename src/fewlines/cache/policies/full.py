"""Keep every token: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import NOBODY, StaticPolicy


@dataclass(frozen=True)
class Full(StaticPolicy):
    """Nobody goes."""

    name: ClassVar[str] = "full"

    def victims(self, geometry: Geometry, room: Table) -> Table:
        return np.full((*room.shape, geometry.n_tokens), NOBODY)
