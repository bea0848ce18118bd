"""Training of the autoregressive transformer: Muon on the blocks' matrices, AdamW on the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.config import ModelSettings
from fewlines.models.transformer import Attend, Transformer, TransformerShape, causal
from fewlines.training.loop import Task, batch_indices, step_generator
from fewlines.training.muon import Muon


def flops_per_image(shape: TransformerShape) -> float:
    """Floating-point operations of training on one image, forward and backward: six per weight
    and token in matrix products, and causal attention. The optimiser's are not counted."""
    attention = shape.dim * shape.dim * 2 + 2 * shape.dim * shape.kv_heads * shape.head_dim
    weights = shape.layers * (attention + 3 * shape.dim * shape.hidden) + shape.dim * shape.codes
    n = shape.geometry.n_tokens
    return 6 * n * weights + 6 * shape.layers * n * n * shape.dim


class TransformerTask(Task):
    """Next-code likelihood of `codes` `(n, N)` of classes `labels` `(n,)`."""

    def __init__(
        self,
        settings: ModelSettings,
        shape: TransformerShape,
        labels: Tensor,
        codes: Tensor,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attend: Attend = causal,
    ) -> None:
        self.settings, self.seed, self.dtype, self.attend = settings, seed, dtype, attend
        self.labels, self.codes = labels, codes.long()
        self.steps, self.warmup = settings.steps, settings.warmup
        self.network: Transformer = Transformer(shape)
        self.network.initialise(step_generator(seed, 0))
        self.optimizers = self._optimizers(shape)

    def _optimizers(self, shape: TransformerShape) -> list[torch.optim.Optimizer]:
        matrices, fused, rest = [], [], []
        for name, parameter in self.network.named_parameters():
            if name.endswith("wqkv.weight"):
                fused.append(parameter)
            elif name.startswith("layers.") and parameter.ndim == 2:
                matrices.append(parameter)
            else:
                rest.append(parameter)
        kv_rows = shape.kv_heads * shape.head_dim
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": fused, "split": [shape.dim, kv_rows, kv_rows]},
        ]
        adamw = torch.optim.AdamW(
            rest, lr=self.settings.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        return [Muon(groups, lr=self.settings.muon_rate), adamw]

    def fingerprint(self) -> Any:
        settings = self.settings.model_dump(mode="json")
        return [settings, repr(self.network.shape), self.seed, str(self.dtype)]

    def loss(self, step: int) -> Tensor:
        rows = batch_indices(len(self.codes), self.settings.batch, step, self.seed)
        codes, labels = self.codes[rows], self.labels[rows]
        generator = step_generator(self.seed + 1, step)
        dropped = torch.rand(len(labels), generator=generator) < self.settings.class_dropout
        labels = labels.masked_fill(dropped, self.network.null_class)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network.teacher_forced(labels, codes, self.attend)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
