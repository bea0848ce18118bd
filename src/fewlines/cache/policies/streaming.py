"""StreamingLLM (arXiv 2309.17453): the first tokens, which act as attention sinks, and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import NOBODY, StaticPolicy


@dataclass(frozen=True)
class Streaming(StaticPolicy):
    """Keeps the first `sinks` image tokens and the last `room − sinks`.

    Where the room is too small for `sinks` and the token being decoded, fewer sinks are kept.
    """

    name: ClassVar[str] = "streaming"
    sinks: int = 4

    def victims(self, geometry: Geometry, room: Table) -> Table:
        step = np.arange(geometry.n_tokens)
        room = room[..., None]
        window = room - np.minimum(self.sinks, room - 1)
        return np.where(step < room, NOBODY, step - window)
