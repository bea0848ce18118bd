"""Expected attention of a full-cache model: what a schedule is calibrated on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewlines.cache.calibration import Calibration
from fewlines.models.transformer import Transformer


class _Recorder:
    """Causal attention that adds up its own probabilities."""

    def __init__(self, model: Transformer) -> None:
        geometry = model.shape.geometry
        n = geometry.n_tokens
        self.prefix = geometry.prefix
        self.sums = torch.zeros(geometry.layers, geometry.heads, n, n, dtype=torch.float64)
        positions = self.prefix + n - 1
        self.future = torch.ones(positions, positions, dtype=torch.bool).triu(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (k.shape[1], group))  # (B, H, r, T, D)
        scores = queries @ k[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(self.future, -torch.inf).softmax(-1)
        image = weights[..., self.prefix :, self.prefix :].mean(2).sum(0)  # (H, N−1, N−1)
        self.sums[layer, :, :-1, :-1] += image
        out: Tensor = (weights @ v[:, :, None]).flatten(1, 2)
        return out


@torch.inference_mode()
def expected_attention(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
) -> Calibration:
    """Mean attention over images `codes` `(n, N)`; the last token of an image never asks."""
    recorder = _Recorder(model)
    for rows, truth in zip(labels.split(batch), codes.long().split(batch), strict=True):
        model.teacher_forced(rows, truth, recorder)
        done(len(rows))
    mean = (recorder.sums / len(codes)).float().numpy()
    return Calibration(mean, model.shape.grid, len(codes))
