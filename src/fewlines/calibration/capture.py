"""Capture of a full-cache model's attention: what a schedule is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry


class LayeredModel(Protocol):
    """What is asked of a model whose heads are looked at; `models.base.AttentionModel` is one."""

    @property
    def geometry(self) -> Geometry: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def embed(self, labels: Tensor, codes: Tensor) -> Tensor: ...  # noqa: D102
    def run_layers(  # noqa: D102
        self, x: Tensor, attend: Any = None, first: int = 0, last: int | None = None
    ) -> Tensor: ...
    def read_out(self, x: Tensor) -> Tensor: ...  # noqa: D102


class Recorder:
    """Causal attention that shows its probabilities: `see(layer, weights)`, `(B, H, N−1, N−1)`
    between image tokens, mean over the query heads of a key-value head."""

    def __init__(self, model: LayeredModel, see: Callable[[int, Tensor], None]) -> None:
        """Look at a model; `see` is told of every layer."""
        geometry = model.geometry
        self.prefix, self.see = geometry.prefix, see
        positions = self.prefix + geometry.n_tokens - 1
        future = torch.ones(positions, positions, dtype=torch.bool, device=model.device)
        self.future = future.triu(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as an `Attend` does."""
        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (k.shape[1], group))  # (B, H, r, T, D)
        scores = queries @ k[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(self.future, -torch.inf).softmax(-1)
        self.see(layer, weights[..., self.prefix :, self.prefix :].mean(2))
        out: Tensor = (weights @ v[:, :, None]).flatten(1, 2)
        return out


def capture_expected(
    model: LayeredModel,
    labels: Tensor,
    codes: Tensor,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
) -> Calibration:
    """Average the attention over images; the last token of an image never asks.

    Args:
        model: with a full cache.
        labels: `(n,)`.
        codes: `(n, N)`.
        batch: images of a forward.
        done: told of every batch of every layer.
    """
    layers = list(capture_by_layer(model, labels, codes, batch, done))
    attention = np.concatenate([layer.attention for layer in layers])
    return Calibration(attention, model.geometry.grid, len(codes))


@torch.inference_mode()  # while it runs, not while its caller has a layer in hand
def capture_by_layer(
    model: LayeredModel,
    labels: Tensor,
    codes: Tensor,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
) -> Iterator[Calibration]:
    """Capture as `capture_expected`, one layer `(1, H, N, N)` after the other: on large grids all
    of them would not fit memory. Of the images only what goes from layer to layer is held."""
    geometry = model.geometry
    n = geometry.n_tokens
    given = (part.to(model.device).split(batch) for part in (labels, codes.long()))
    states = [model.embed(rows, truth) for rows, truth in zip(*given, strict=True)]
    for number in range(geometry.layers):
        sums = torch.zeros(1, geometry.heads, n, n, dtype=torch.float64)

        def add(layer: int, weights: Tensor, sums: Tensor = sums) -> None:
            sums[0, :, :-1, :-1] += weights.sum(0).cpu()

        recorder = Recorder(model, add)
        for index, x in enumerate(states):
            states[index] = model.run_layers(x, recorder, number, number + 1)
            done(len(x))
        yield Calibration((sums / len(codes)).float().numpy(), geometry.grid, len(codes))


def capture_attention(model: LayeredModel, labels: Tensor, codes: Tensor) -> list[Tensor]:
    """Capture the attention `(B, H, N, N)` of each layer on these very images.

    Args:
        model: with a full cache.
        labels: `(B,)`.
        codes: `(B, N)`.
    """
    found: list[Tensor] = []
    recorder = Recorder(model, lambda layer, weights: found.append(F.pad(weights, (0, 1, 0, 1))))
    model.run_layers(model.embed(labels, codes), recorder)
    return found
