"""PyramidKV (arXiv 2406.02069): early layers hold more than late ones."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Allocation, Total
from fewlines.calibration.losses import SMALLEST
from fewlines.geometry import Table

STEEPNESS = 20  # the paper's β: the last layer gets a β-th of the mean


class Pyramid(Allocation):
    """Capacities fall evenly from the first layer to the last; what exceeds an image is given to
    the layers above."""

    name = "pyramid"
    label = "pyramid"

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total by layers."""
        (layers, heads), n = total.shape, total.geometry.n_tokens
        mean = total.tokens / (layers * heads)
        low = mean / STEEPNESS
        wanted = np.linspace(2 * mean - low, low, layers) if layers > 1 else np.array([mean])
        capacity = np.clip(wanted.round().astype(int), SMALLEST, n)
        left = total.tokens // heads - int(capacity.sum())
        while left > 0:  # rounding and clipping: to the first layer that can take it
            capacity[np.flatnonzero(capacity < n)[0]] += 1
            left -= 1
        while left < 0:  # or from the last that can give it
            capacity[np.flatnonzero(capacity > SMALLEST)[-1]] -= 1
            left += 1
        return total.add_merge_slots(np.repeat(capacity[:, None], heads, axis=1))
