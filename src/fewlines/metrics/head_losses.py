"""What single heads lose under the schedule: what allocations go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fewlines.attention.teacher_forced import limit_head
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policies.scheduled import Scheduled
from fewlines.calibration.capture import LayeredModel
from fewlines.calibration.data import Calibration, LossCurves, average
from fewlines.calibration.losses import BANDS, list_capacities, measure_losses
from fewlines.progress import progress

Given = tuple[LayeredModel, Tensor, Tensor]  # a model, labels `(n,)` and codes `(n, N)`


def add_losses(requires: str, parts: Sequence[tuple[Calibration, Given]]) -> Calibration:
    """Average calibrations, and add the losses that a cache goes by.

    Args:
        requires: `Cache.requires`.
        parts: where heads look on some images, and what it was measured on.
    """
    found = average([part for part, _ in parts])
    each = [(replace(found, images=part.images), given) for part, given in parts]
    for needed, add in (("losses", add_curves), ("band losses", add_bands)):
        if requires.endswith(needed):
            each = [(add(part, *given), given) for part, given in each]
    return average([part for part, _ in each])


def add_curves(
    found: Calibration, network: LayeredModel, labels: Tensor, codes: Tensor
) -> Calibration:
    """Add what each head loses when it is limited and its victims are merged.

    Args:
        found: where the heads look.
        network: whose heads they are.
        labels: of images to measure on, `(n,)`.
        codes: `(n, N)`.
    """
    loss = _measure_losses(found, network, labels, codes, 1)
    return replace(found, curves=LossCurves(np.array(list_capacities(network.geometry)), loss))


def add_bands(
    found: Calibration, network: LayeredModel, labels: Tensor, codes: Tensor
) -> Calibration:
    """Add what each head loses with several merge slots; see `add_curves`, which comes first."""
    losses = {count: _measure_losses(found, network, labels, codes, count) for count in BANDS}
    return replace(found, curves=replace(found.require_curves(), of_bands=losses))


def _measure_losses(
    found: Calibration, network: LayeredModel, labels: Tensor, codes: Tensor, merge_slots: int
) -> Any:
    geometry = network.geometry
    capacities = list_capacities(geometry)
    limit = limit_by_schedule(network, found, capacities, merge_slots)
    total = (len(capacities) - 1) * geometry.layers * geometry.heads
    bar = progress(f"what each head loses, {merge_slots} merge slots", total, "capacities")
    loss = measure_losses(network, labels, codes, limit, len(capacities), bar.update)
    bar.close()
    return loss


def limit_by_schedule(
    network: LayeredModel, found: Calibration, capacities: list[int], merge_slots: int
) -> Callable[[int, int, int], Any]:
    """Make the limits of single heads under the schedule, victims merged.

    Args:
        network: whose heads they are.
        found: its calibration.
        capacities: of a head; the last, a whole image, needs no limit.
        merge_slots: of a head.

    Returns:
        Layer, head and index of a capacity → the attention in which this head alone is limited.
    """
    geometry = network.geometry
    alike = np.full((geometry.layers, geometry.heads), 1)
    plans = []
    for capacity in capacities[:-1]:
        victims = Scheduled().choose_victims(geometry, alike * capacity, found)
        plans.append(EvictionPlan(geometry, alike * capacity, alike * merge_slots, victims))
    return lambda layer, head, index: limit_head(plans[index], layer, head, network.device)
