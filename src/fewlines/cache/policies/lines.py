"""The raster window: the last tokens, a few lines of them, as the paper's text plainly reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import NOBODY, StaticPolicy


@dataclass(frozen=True)
class Lines(StaticPolicy):
    """The oldest goes."""

    name: ClassVar[str] = "lines"

    def victims(self, geometry: Geometry, room: Table) -> Table:
        step = np.arange(geometry.n_tokens)
        room = room[..., None]
        return np.where(step < room, NOBODY, step - room)
