"""Each head gets the share with which evicted tokens get the least expected attention: the
cheap baseline of `calibrated`."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import (
    Allocation,
    Losses,
    Total,
    minimise_losses,
)
from fewlines.cache.policy import NO_VICTIM, CalibratedPolicy, Policy
from fewlines.calibration.losses import SMALLEST
from fewlines.errors import FewlinesError
from fewlines.geometry import Table


class Mass(Allocation):
    """Expected attention mass, on the schedule's own victims."""

    name = "mass"
    label = "mass"
    requires = "attention"

    def check(self, policy: Policy, merge: bool) -> None:
        """Refuse policies without a schedule."""
        if not isinstance(policy, CalibratedPolicy):
            raise FewlinesError(f"cache: {policy} has no schedule to weigh heads by")

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total where the least mass is lost."""
        capacities = range(SMALLEST, total.geometry.n_tokens + 1)
        lost = [_sum_lost_mass(total, np.full(total.shape, each)) for each in capacities]
        return total.add_merge_slots(minimise_losses(np.stack(lost, axis=-1), total.tokens))


def _sum_lost_mass(total: Total, capacity: Table) -> Losses:
    """Sum the expected attention `(L, H)` to evicted tokens over an image's queries."""
    assert isinstance(total.policy, CalibratedPolicy)
    victims = total.policy.choose_victims(total.geometry, capacity, total.calibration)
    future = total.calibration.future  # (L, H, q, k)
    layer, head, step = np.nonzero(victims != NO_VICTIM)
    lost = np.zeros(capacity.shape)
    np.add.at(lost, (layer, head), future[layer, head, step, victims[layer, head, step]])
    return lost
