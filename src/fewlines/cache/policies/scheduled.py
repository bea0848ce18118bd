"""A static schedule of which token each head lets go, calibrated once: ours.

Where a head of a raster model looks is a matter of place more than of content. So before each
query, each head evicts the resident with the least expected future attention, summed over all
queries still to come: Belady's rule in expectation. Nothing is scored while an image is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewlines.cache.policy import NO_VICTIM, CalibratedPolicy
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Scheduled(CalibratedPolicy):
    """The least expected future attention is evicted."""

    name: ClassVar[str] = "scheduled"

    def choose_victims(
        self, geometry: Geometry, capacity: Table, calibration: Calibration
    ) -> Table:
        """Choose the victim of each image token."""
        n = geometry.n_tokens
        victims = np.full((*capacity.shape, n), NO_VICTIM)
        for layer, head in np.ndindex(capacity.shape):
            resident = np.zeros(n, dtype=bool)
            for step in range(n):
                if resident.sum() == capacity[layer, head]:
                    score = np.where(resident, calibration.future[layer, head, step], np.inf)
                    victims[layer, head, step] = score.argmin()
                    resident[victims[layer, head, step]] = False
                resident[step] = True
        return victims
