"""What the model loses when one head alone is limited: what calibrated budgets go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.calibration import Calibration, Curves
from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Placement, make_policy
from fewlines.cache.policy import CalibratedPolicy
from fewlines.cache.split import SMALLEST
from fewlines.cache.teacher import Limits
from fewlines.models.transformer import Attend, Transformer, causal

GROWTH = 1.5  # from one room of the curves to the next
SUMMARIES = (4, 8)  # of a head that has several: two and a whole line of them are seldom best


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


def measure_curves(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    calibration: Calibration,
    done: Callable[[int], object] = lambda heads: None,
) -> Curves:
    """KL(full ‖ limited) on images `codes` `(n, N)` for every head and room, under the schedule,
    victims folded."""
    geometry = model.shape.geometry
    rooms = np.array(rooms_of(geometry))
    return Curves(rooms, _losses(model, labels, codes, calibration, rooms, 1, done))


def measure_summaries(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    calibration: Calibration,
    done: Callable[[int], object] = lambda heads: None,
) -> Curves:
    """The curves of a calibration, and beside them those of a head with several summaries."""
    curves = calibration.require_curves()
    of_more = {
        count: _losses(model, labels, codes, calibration, curves.rooms, count, done)
        for count in SUMMARIES
    }
    return replace(curves, of_more=of_more)


@torch.inference_mode()
def _losses(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    calibration: Calibration,
    rooms: npt.NDArray[np.int64],
    summaries: int,
    done: Callable[[int], object],
) -> npt.NDArray[np.float64]:
    """`(L, H, R)`; nothing is lost with the last room, a whole image."""
    geometry, device = model.shape.geometry, model.norm.weight.device
    policy = make_policy("scheduled", {})
    assert isinstance(policy, CalibratedPolicy)
    shape = (geometry.layers, geometry.heads)
    alike, placements = np.full(shape, summaries), []
    for room in rooms[:-1]:
        tokens = np.full(shape, room)
        victims = policy.victims(geometry, tokens, calibration)
        placements.append(Placement(geometry, tokens, alike, victims))
    x = model.embed(labels.to(device), codes.long().to(device))
    rotation = model.rotations[: x.shape[1]]
    full = model(x)[:, geometry.prefix - 1 :].log_softmax(-1)
    loss = np.zeros((*shape, len(rooms)))
    for layer, block in enumerate(model.layers):
        # The layers below are those of the full cache: `x` has been through them.
        for head, index in np.ndindex(geometry.heads, len(placements)):
            attend = _one_limited(placements[index], layer, head, device)
            under = model(x, 0, attend, layer)[:, geometry.prefix - 1 :].log_softmax(-1)
            found = F.kl_div(under, full, reduction="none", log_target=True).sum(-1).mean()
            loss[layer, head, index] = found.item()
            done(1)
        x = block(layer, x, rotation, causal)
    return loss


def _one_limited(placement: Placement, at: int, head: int, device: torch.device) -> Attend:
    """Attention in which one head of the layer `at` is limited as a cache limits it."""
    evicted_at = torch.from_numpy(placement.evicted_at[at, head, None])
    summaries = int(placement.summaries[at, head])
    limits = Limits(evicted_at, placement, summaries, torch.float32, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = causal(layer, q, k, v)
        if layer == at:
            queries, own = q.unflatten(1, (k.shape[1], -1))[:, head], slice(head, head + 1)
            limited = limits.attend(queries, k[:, own], v[:, own])
            y.unflatten(1, (k.shape[1], -1))[:, head] = limited
        return y

    return attend
