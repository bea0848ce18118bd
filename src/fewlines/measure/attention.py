"""Expected attention of a full-cache model: what a schedule is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.calibration import Calibration
from fewlines.models.transformer import Transformer


class Recorder:
    """Causal attention that shows its probabilities: `see(layer, weights)`, `(B, H, N−1, N−1)`
    between image tokens, mean over the query heads of a key-value head."""

    def __init__(self, model: Transformer, see: Callable[[int, Tensor], None]) -> None:
        geometry = model.shape.geometry
        self.prefix, self.see = geometry.prefix, see
        positions = self.prefix + geometry.n_tokens - 1
        device = model.norm.weight.device
        self.future = torch.ones(positions, positions, dtype=torch.bool, device=device).triu(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (k.shape[1], group))  # (B, H, r, T, D)
        scores = queries @ k[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(self.future, -torch.inf).softmax(-1)
        self.see(layer, weights[..., self.prefix :, self.prefix :].mean(2))
        out: Tensor = (weights @ v[:, :, None]).flatten(1, 2)
        return out


def expected_attention(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
) -> Calibration:
    """Mean attention over images `codes` `(n, N)`; the last token of an image never asks. `done`
    is told of every batch of every layer."""
    layers = list(expected_by_layer(model, labels, codes, batch, done))
    attention = np.concatenate([layer.attention for layer in layers])
    return Calibration(attention, model.shape.grid, len(codes))


@torch.inference_mode()  # while it runs, not while its caller has a layer in hand
def expected_by_layer(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
) -> Iterator[Calibration]:
    """The same, one layer `(1, H, N, N)` after the other: on large grids all of them would not fit
    memory. Of the images only what goes from layer to layer is held."""
    geometry, device = model.shape.geometry, model.norm.weight.device
    n = geometry.n_tokens
    given = (part.to(device).split(batch) for part in (labels, codes.long()))
    states = [model.embed(rows, truth) for rows, truth in zip(*given, strict=True)]
    rotation = model.rotations[: states[0].shape[1]]
    for number, block in enumerate(model.layers):
        sums = torch.zeros(1, geometry.heads, n, n, dtype=torch.float64)

        def add(layer: int, weights: Tensor, sums: Tensor = sums) -> None:
            sums[0, :, :-1, :-1] += weights.sum(0).cpu()

        recorder = Recorder(model, add)
        for index, x in enumerate(states):
            states[index] = block(number, x, rotation, recorder)
            done(len(x))
        yield Calibration((sums / len(codes)).float().numpy(), model.shape.grid, len(codes))


def attention_of(model: Transformer, labels: Tensor, codes: Tensor) -> list[Tensor]:
    """Attention `(B, H, N, N)` of each layer on these very images, `codes` `(B, N)`."""
    found: list[Tensor] = []
    recorder = Recorder(model, lambda layer, weights: found.append(F.pad(weights, (0, 1, 0, 1))))
    model.teacher_forced(labels, codes, recorder)
    return found
