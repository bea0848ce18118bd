"""Every head holds as much as every other: the baseline."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Allocation, add_merge_slot
from fewlines.cache.policy import Policy
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry, Table


class Uniform(Allocation):
    """The total in equal parts."""

    name = "uniform"
    label = ""

    def allocate(
        self,
        policy: Policy,
        geometry: Geometry,
        total: int,
        calibration: Calibration | None,
        merge: bool,
    ) -> tuple[Table, Table]:
        """Divide the total in equal parts."""
        shape = (geometry.layers, geometry.heads)
        return add_merge_slot(np.full(shape, total // (shape[0] * shape[1])), merge)
