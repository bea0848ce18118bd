"""Each head gets the share with which the model was measured to lose the least likelihood."""

from __future__ import annotations

from typing import ClassVar

from fewlines.cache.allocation import (
    Allocation,
    Requirement,
    Total,
    interpolate_losses,
    minimise_losses,
)
from fewlines.cache.policy import Policy
from fewlines.errors import FewlinesError
from fewlines.geometry import Table


class Calibrated(Allocation):
    """The losses of single heads, measured with merging in place, are taken to add up."""

    name = "calibrated"
    label = "allocated"
    requires: ClassVar[Requirement] = "losses"

    def check(self, policy: Policy, merge: bool) -> None:
        """Refuse policies that are not calibrated and caches that drop their victims."""
        if not (merge and policy.calibrated):
            raise FewlinesError(
                f"cache: 'allocation: {self.name}' is measured with the schedule's victims merged; "
                f"{policy}{'' if merge else ' without merge'} can be allocated by mass, or as "
                "pyramid, headkv and ada do"
            )

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total where the curves of `LossCurves` fall most."""
        curves = total.calibration.require_curves()
        losses = interpolate_losses(curves.capacities, curves.loss, total.geometry)
        return total.add_merge_slots(minimise_losses(losses, total.tokens))
