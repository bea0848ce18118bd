"""What the model loses when one head alone is limited: what calibrated budgets go by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.calibration import Calibration, Curves
from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Placement, make_policy
from fewlines.cache.policy import NOBODY, CalibratedPolicy
from fewlines.cache.split import SMALLEST
from fewlines.cache.teacher import TeacherForced
from fewlines.models.transformer import Transformer

GROWTH = 1.5  # from one room of the curves to the next


def rooms_of(geometry: Geometry) -> list[int]:
    """Rooms at which curves are measured: from the smallest to a whole image, and those in which
    the tokens above the one being decoded, and beside that, just fit or just do not. A head that
    looks at one of them loses nothing with one room and everything with one token less; measured
    further apart, what lies between seemed harmless and was ruinous."""
    n, width = geometry.n_tokens, geometry.width
    rooms = [SMALLEST]
    while rooms[-1] < n:
        rooms.append(min(n, max(rooms[-1] + 1, round(rooms[-1] * GROWTH))))
    return sorted({*rooms, *range(max(SMALLEST, width - 1), min(width + 3, n))})


@torch.inference_mode()
def measure_curves(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    calibration: Calibration,
    done: Callable[[int], object] = lambda heads: None,
) -> Curves:
    """KL(full ‖ limited) on images `codes` `(n, N)` for every head and room, under the schedule,
    victims folded."""
    geometry, device = model.shape.geometry, model.norm.weight.device
    labels, truth = labels.to(device), codes.long().to(device)
    policy = make_policy("scheduled", {})
    assert isinstance(policy, CalibratedPolicy)
    rooms = rooms_of(geometry)
    shape = (geometry.layers, geometry.heads)
    full = model.teacher_forced(labels, truth).log_softmax(-1)
    loss = np.zeros((*shape, len(rooms)))
    for index, room in enumerate(rooms[:-1]):
        victims = policy.victims(geometry, np.full(shape, room), calibration)
        for head in np.ndindex(shape):
            capacity = np.full(shape, geometry.n_tokens + 1)
            capacity[head] = room + 1
            limited = np.full_like(victims, NOBODY)
            limited[head] = victims[head]
            attend = TeacherForced(Placement(geometry, capacity, limited, fold=True), device=device)
            under = model.teacher_forced(labels, truth, attend).log_softmax(-1)
            found = F.kl_div(under, full, reduction="none", log_target=True).sum(-1).mean()
            loss[head][index] = found.item()
            done(1)
    return Curves(np.array(rooms), loss)
