"""HeadKV (arXiv 2605.20600): heads that look near keep only a window; the others get what these
free. Heads are typed from calibration here, not in the same image as by the paper's online rule.
"""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Allocation, Total
from fewlines.calibration.losses import SMALLEST
from fewlines.geometry import Table

LOCAL = 0.9  # the paper's τ


class HeadKV(Allocation):
    """A head that finds a share `LOCAL` of its attention among its last few tokens, fewer than the
    uniform capacity, keeps only so many, and what its policy pins."""

    name = "headkv"
    label = "headkv"
    requires = "attention"

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total between local heads and the others."""
        n, (layers, heads) = total.geometry.n_tokens, total.shape
        uniform = total.tokens // (layers * heads)
        distance = np.arange(n)[:, None] - np.arange(n)  # (q, k)
        inside = distance >= 0
        mass = np.stack(
            [
                np.bincount(distance[inside], head[inside], minlength=n)
                for head in total.calibration.attention.reshape(-1, n, n)
            ]
        ).cumsum(1)  # (L·H, reach)
        reach = (mass < LOCAL * mass[:, -1:]).sum(1) + 1
        reach += total.policy.count_pinned(total.geometry, np.full_like(reach, uniform))
        capacity = np.where(reach < uniform, reach.clip(SMALLEST), 0)
        far = np.flatnonzero(capacity == 0)
        if len(far) == 0:
            return total.add_merge_slots(np.full(total.shape, uniform))
        left = total.tokens - int(capacity.sum())
        capacity[far] = left // len(far)
        capacity[far[: left % len(far)]] += 1
        return total.add_merge_slots(np.minimum(capacity, n).reshape(total.shape))
