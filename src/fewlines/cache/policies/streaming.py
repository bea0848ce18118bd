"""StreamingLLM (arXiv 2309.17453): the first tokens, which act as attention sinks, and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, Anchors, StaticPolicy, count_anchors
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Streaming(StaticPolicy):
    """Keeps the first `sinks` image tokens, the paper's four or `auto` (see `count_anchors`), and
    the last `capacity − sinks`.

    Where the capacity is too small for `sinks` and the token being decoded, fewer sinks are kept.
    """

    name: ClassVar[str] = "streaming"
    sinks: Anchors = 4

    def count_pinned(self, geometry: Geometry, capacity: Table) -> Table:
        """Count the sinks."""
        return count_anchors(self.sinks, geometry, capacity)

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token."""
        step = np.arange(geometry.n_tokens)
        window = (capacity - self.count_pinned(geometry, capacity))[..., None]
        capacity = capacity[..., None]
        return np.where(step < capacity, NO_VICTIM, step - window)
