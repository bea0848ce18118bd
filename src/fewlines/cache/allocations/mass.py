"""Each head gets the share with which the least expected attention goes to evicted tokens: the
cheap baseline of `calibrated`."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import (
    Allocation,
    Losses,
    add_merge_slot,
    minimise_losses,
)
from fewlines.cache.policy import NO_VICTIM, CalibratedPolicy, Policy
from fewlines.calibration.data import Calibration
from fewlines.calibration.losses import SMALLEST
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry, Table


class Mass(Allocation):
    """Expected attention mass, on the schedule's own victims."""

    name = "mass"
    label = "mass"
    requires = "attention"

    def check(self, policy: Policy, merge: bool) -> None:
        """Refuse policies without a schedule."""
        if not isinstance(policy, CalibratedPolicy):
            raise FewlinesError(f"cache: {policy} has no schedule to weigh heads by")

    def allocate(
        self,
        policy: Policy,
        geometry: Geometry,
        total: int,
        calibration: Calibration | None,
        merge: bool,
    ) -> tuple[Table, Table]:
        """Divide the total where the least mass is lost."""
        assert isinstance(policy, CalibratedPolicy)
        assert calibration is not None
        shape = (geometry.layers, geometry.heads)
        capacities = range(SMALLEST, geometry.n_tokens + 1)
        lost = [
            _sum_lost_mass(policy, geometry, np.full(shape, each), calibration)
            for each in capacities
        ]
        return add_merge_slot(minimise_losses(np.stack(lost, axis=-1), total), merge)


def _sum_lost_mass(
    policy: CalibratedPolicy, geometry: Geometry, capacity: Table, calibration: Calibration
) -> Losses:
    """Sum the expected attention `(L, H)` to evicted tokens over an image's queries."""
    victims = policy.choose_victims(geometry, capacity, calibration)
    future = calibration.future  # (L, H, q, k)
    layer, head, step = np.nonzero(victims != NO_VICTIM)
    lost = np.zeros(capacity.shape)
    np.add.at(lost, (layer, head), future[layer, head, step, victims[layer, head, step]])
    return lost
