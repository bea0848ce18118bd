"""The 'fixed' pattern of sparse transformers (arXiv 1904.10509): the current line, and the last
columns of every line before it.

Their 'strided' pattern saves computation, not cache: its queries need every token resident in
turn, so there is nothing that a cache could let go, and no policy for it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewlines.cache.policy import StaticPolicy, evict_one_by_one
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Fixed(StaticPolicy):
    """As many last columns as the capacity holds for all lines, at least one; tokens left of them
    go first, oldest first. Where even the columns do not fit, the oldest of them go."""

    name: ClassVar[str] = "fixed"

    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token."""
        height, width = geometry.grid

        def choose(layer: int, head: int, step: int, resident: list[int]) -> int:
            columns = max(1, (int(capacity[layer, head]) - width) // max(1, height - 1))
            line = step - step % width
            left = (t for t in resident if t < line and t % width < width - columns)
            return next(left, resident[0])

        return evict_one_by_one(geometry, capacity, choose)
