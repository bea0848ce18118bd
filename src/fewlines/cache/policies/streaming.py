"""StreamingLLM (arXiv 2309.17453): the first tokens, which act as attention sinks, and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, StaticPolicy
from fewlines.geometry import Geometry, Table
from fewlines.schema import Count


@dataclass(frozen=True)
class Streaming(StaticPolicy):
    """Keeps the first `sinks` image tokens and the last `capacity − sinks`.

    Where the capacity is too small for `sinks` and the token being decoded, fewer sinks are kept.
    """

    name: ClassVar[str] = "streaming"
    sinks: Count = 4

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose whom each image token evicts."""
        step = np.arange(geometry.n_tokens)
        capacity = capacity[..., None]
        window = capacity - np.minimum(self.sinks, capacity - 1)
        return np.where(step < capacity, NO_VICTIM, step - window)
