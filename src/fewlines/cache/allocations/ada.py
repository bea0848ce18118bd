"""Ada-KV (arXiv 2407.11550): of the tokens that a layer's heads look at most, as many as the layer
may hold, are counted by head.

Ada-KV counts anew for every prompt and pads; here it is the mean over the queries of calibration,
the same for every image, so that bytes really fall. A floor is everyone's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewlines.cache.allocation import Allocation, add_merge_slot
from fewlines.cache.policy import Policy
from fewlines.calibration.data import Calibration
from fewlines.calibration.losses import SMALLEST
from fewlines.geometry import Geometry, Table

FLOOR = 0.2  # the paper's α: the share of the uniform capacity that is everyone's


class Ada(Allocation):
    """A layer's heads by the joint rank of what they look at."""

    name = "ada"
    label = "ada"
    requires = "attention"

    def allocate(
        self,
        policy: Policy,
        geometry: Geometry,
        total: int,
        calibration: Calibration | None,
        merge: bool,
    ) -> tuple[Table, Table]:
        """Divide each layer's part of the total among its heads."""
        assert calibration is not None
        n, layers, heads = geometry.n_tokens, geometry.layers, geometry.heads
        uniform = total // (layers * heads)
        capacity = np.empty((layers, heads), int)
        for layer, attention in enumerate(calibration.attention.astype(np.float32)):  # (H, q, k)
            held = total // layers + (layer < total % layers)
            found = np.zeros(heads)
            for query in range(uniform, n):  # those that cannot see everything
                seen = attention[:, query, : query + 1].ravel()
                best = np.argpartition(seen, -held)[-held:]
                found += np.bincount(best // (query + 1), minlength=heads)
            wanted = FLOOR * held / heads + (1 - FLOOR) * held * found / found.sum()
            capacity[layer] = _round_to_total(wanted, held, n)
        return add_merge_slot(capacity, merge)


def _round_to_total(wanted: npt.NDArray[np.float64], total: int, most: int) -> Table:
    """Round to whole numbers from `SMALLEST` to `most` of this sum."""
    rounded = wanted.round().astype(int).clip(SMALLEST, most)
    while (over := int(rounded.sum()) - total) != 0:
        step = -1 if over > 0 else 1
        allowed = rounded > SMALLEST if over > 0 else rounded < most
        missing = np.where(allowed, step * (wanted - rounded), -np.inf)
        rounded[missing.argmax()] += step
    return rounded
