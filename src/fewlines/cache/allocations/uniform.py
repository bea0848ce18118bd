"""Every head holds as much as every other: the baseline."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Allocation, Total
from fewlines.geometry import Table


class Uniform(Allocation):
    """The total in equal parts."""

    name = "uniform"
    label = ""

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total in equal parts."""
        layers, heads = total.shape
        return total.add_merge_slots(np.full(total.shape, total.tokens // (layers * heads)))
