"""Ada-KV (arXiv 2407.11550): of the tokens that a layer's heads look at most, as many as the layer
may hold, are counted by head.

Ada-KV counts anew for every prompt and pads; here it is the mean over the queries of calibration,
the same for every image, so that bytes really fall. A floor is everyone's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewlines.cache.allocation import Allocation, Total
from fewlines.calibration.losses import SMALLEST
from fewlines.geometry import Table

FLOOR = 0.2  # the paper's α: the share of the uniform capacity that is everyone's


class Ada(Allocation):
    """A layer's heads by the joint rank of what they look at."""

    name = "ada"
    label = "ada"
    requires = "attention"

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide each layer's part of the total among its heads."""
        n, (layers, heads) = total.geometry.n_tokens, total.shape
        uniform = total.tokens // (layers * heads)
        capacity = np.empty((layers, heads), int)
        for layer, attention in enumerate(
            total.calibration.attention.astype(np.float32)
        ):  # (H, q, k)
            held = total.tokens // layers + (layer < total.tokens % layers)
            found = np.zeros(heads)
            # Those that cannot see everything; the last token never asks.
            for query in range(min(uniform, n - 2), n - 1):
                seen = attention[:, query, : query + 1].ravel()
                best = np.argpartition(seen, -held)[-held:]
                found += np.bincount(best // (query + 1), minlength=heads)
            wanted = FLOOR * held / heads + (1 - FLOOR) * held * found / found.sum()
            capacity[layer] = _round_to_total(wanted, held, n)
        return total.add_merge_slots(capacity)


def _round_to_total(wanted: npt.NDArray[np.float64], total: int, most: int) -> Table:
    """Round to whole numbers from `SMALLEST` to `most` of this sum."""
    rounded = wanted.round().astype(int).clip(SMALLEST, most)
    while (over := int(rounded.sum()) - total) != 0:
        step = -1 if over > 0 else 1
        allowed = rounded > SMALLEST if over > 0 else rounded < most
        missing = np.where(allowed, step * (wanted - rounded), -np.inf)
        rounded[missing.argmax()] += step
    return rounded
