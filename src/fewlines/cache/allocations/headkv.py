"""HeadKV (arXiv 2605.20600): heads that look near keep only a window; what they free goes to the
others. Heads are typed from calibration here, not in the same image as by the paper's online rule.
"""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Allocation, add_merge_slot
from fewlines.cache.policy import Policy
from fewlines.calibration.data import Calibration
from fewlines.calibration.losses import SMALLEST
from fewlines.geometry import Geometry, Table

LOCAL = 0.9  # the paper's τ


class HeadKV(Allocation):
    """A head that finds a share `LOCAL` of its attention among its last few tokens, fewer than the
    uniform capacity, keeps only so many."""

    name = "headkv"
    label = "headkv"
    requires = "attention"

    def allocate(
        self,
        policy: Policy,
        geometry: Geometry,
        total: int,
        calibration: Calibration | None,
        merge: bool,
    ) -> tuple[Table, Table]:
        """Divide the total between local heads and the others."""
        assert calibration is not None
        n, shape = geometry.n_tokens, (geometry.layers, geometry.heads)
        uniform = total // (shape[0] * shape[1])
        distance = np.arange(n)[:, None] - np.arange(n)  # (q, k)
        inside = distance >= 0
        mass = np.stack(
            [
                np.bincount(distance[inside], head[inside], minlength=n)
                for head in calibration.attention.reshape(-1, n, n)
            ]
        ).cumsum(1)  # (L·H, reach)
        reach = (mass < LOCAL * mass[:, -1:]).sum(1) + 1
        capacity = np.where(reach < uniform, reach.clip(SMALLEST), 0)
        far = np.flatnonzero(capacity == 0)
        if len(far) == 0:
            return add_merge_slot(np.full(shape, uniform), merge)
        left = total - int(capacity.sum())
        capacity[far] = left // len(far)
        capacity[far[: left % len(far)]] += 1
        return add_merge_slot(np.minimum(capacity, n).reshape(shape), merge)
