"""As `calibrated`, and a head may have several merge slots, one for each band of columns."""

from __future__ import annotations

import numpy as np

from fewlines.cache.allocation import Total, interpolate_losses, minimise_losses
from fewlines.cache.allocations.calibrated import Calibrated
from fewlines.cache.policy import Policy, ScoringPolicy
from fewlines.calibration.losses import SMALLEST
from fewlines.errors import FewlinesError
from fewlines.geometry import Table


class Bands(Calibrated):
    """Several merge slots in place of as many tokens, where that was measured to lose less."""

    name = "bands"
    label = "bands"
    requires = "band losses"

    def check(self, policy: Policy, merge: bool) -> None:
        """Refuse scoring policies too: they have one merge slot in each head."""
        super().check(policy, merge)
        if isinstance(policy, ScoringPolicy):
            raise FewlinesError(
                f"cache: {policy} has one merge slot in each head; write 'allocation: calibrated'"
            )

    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide the total by the lowest of each head's curves."""
        curves = total.calibration.require_curves()
        if not curves.of_bands:
            raise FewlinesError(
                "cache: this calibration does not say what several merge slots would lose; "
                "'fewlines calibrate --calibration' adds that"
            )
        losses = [interpolate_losses(curves.capacities, curves.loss, total.geometry)]
        for count, loss in curves.of_bands.items():
            fewer = count - 1  # tokens, in the same entries
            shifted = np.full_like(losses[0], np.inf)
            every = interpolate_losses(curves.capacities, loss, total.geometry)
            shifted[..., fewer:] = every[..., :-fewer]
            losses.append(shifted)
        stacked = np.stack(losses)  # (counts, L, H, capacities)
        capacity = minimise_losses(stacked.min(0), total.tokens)
        chosen = np.take_along_axis(stacked, (capacity - SMALLEST)[None, ..., None], -1)[..., 0]
        merge_slots = np.array([1, *curves.of_bands])[chosen.argmin(0)]
        return capacity + 1 - merge_slots, merge_slots
