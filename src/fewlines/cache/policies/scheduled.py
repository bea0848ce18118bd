"""A static schedule of which token each head lets go, calibrated once: ours.

Where a head of a raster model looks is a matter of place more than of content. So before each
query, each head evicts the resident with the least expected future attention, summed over all
queries still to come: Belady's rule in expectation. Nothing is scored while an image is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewlines.cache.policy import CalibratedPolicy, evict_one_by_one
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Scheduled(CalibratedPolicy):
    """The least expected future attention is evicted."""

    name: ClassVar[str] = "scheduled"

    def choose_victims(
        self, geometry: Geometry, capacity: Table, calibration: Calibration
    ) -> Table:
        """Choose whom each image token evicts."""

        def choose(layer: int, head: int, step: int, resident: list[int]) -> int:
            return resident[calibration.future[layer, head, step, resident].argmin()]

        return evict_one_by_one(geometry, capacity, choose)
