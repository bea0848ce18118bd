"""What the model loses when one head alone is limited: what calibrated allocations go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.calibration.capture import LayeredModel
from fewlines.geometry import Geometry

GROWTH = 1.5  # from one capacity of the curves to the next
SMALLEST = 2  # tokens of a head: the one being decoded and one more
BANDS = (4, 8)  # merge slots of a head that has several: two, and a line of them, are seldom best


def list_capacities(geometry: Geometry) -> list[int]:
    """List the capacities at which curves are measured: from the smallest to a whole image, and
    those in which the tokens above the one being decoded, and beside that, just fit or just do not.
    A head that looks at one of them loses nothing with one capacity and everything with one token
    less; measured further apart, what lies between seemed harmless and was ruinous."""
    n, width = geometry.n_tokens, geometry.width
    capacities = [SMALLEST]
    while capacities[-1] < n:
        capacities.append(min(n, max(capacities[-1] + 1, round(capacities[-1] * GROWTH))))
    return sorted({*capacities, *range(max(SMALLEST, width - 1), min(width + 3, n))})


@torch.inference_mode()
def measure_losses(
    model: LayeredModel,
    labels: Tensor,
    codes: Tensor,
    limit: Callable[[int, int, int], Any],
    count: int,
    done: Callable[[int], object] = lambda heads: None,
) -> npt.NDArray[np.float64]:
    """Measure KL(full ‖ limited) in nats/token, of every head at every capacity.

    Args:
        model: with a full cache.
        labels: `(n,)`.
        codes: `(n, N)`.
        limit: layer, head and number of a capacity → the attention that limits this head alone.
        count: of capacities; the last is a whole image, where nothing is lost.
        done: told of every head at every capacity.

    Returns:
        `(L, H, count)`.
    """
    geometry = model.geometry
    x = model.embed(labels.to(model.device), codes.long().to(model.device))
    full = model.read_out(model.run_layers(x)).log_softmax(-1)
    loss = np.zeros((geometry.layers, geometry.heads, count))
    for layer in range(geometry.layers):
        # The layers below are those of the full cache: `x` has been through them.
        for head, index in np.ndindex(geometry.heads, count - 1):
            limited = model.run_layers(x, limit(layer, head, index), layer)
            under = model.read_out(limited).log_softmax(-1)
            found = F.kl_div(under, full, reduction="none", log_target=True).sum(-1).mean()
            loss[layer, head, index] = found.item()
            done(1)
        x = model.run_layers(x, None, layer, layer + 1)
    return loss
