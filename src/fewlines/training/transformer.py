"""Training of the autoregressive transformer: Muon on the blocks' matrices, AdamW on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.line_parallel import attention_under
from fewlines.cache.placement import Placement
from fewlines.config import ModelSettings
from fewlines.files import digest
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


def new_transformer(shape: TransformerShape, seed: int) -> Transformer:
    """Untrained weights, the same for the same seed."""
    network = Transformer(shape)
    network.initialise(step_generator(seed, 0))
    return network


def attend_in_training(placement: Placement, device: torch.device) -> Attend:
    """The attention of training under a cache; with a full one, the fused causal kernel."""
    return causal if placement.is_full else attention_under(placement, device)


def _limit(attend: Attend) -> str:
    """What tells one attention from another."""
    placement = getattr(attend, "placement", None)
    return placement.fingerprint if isinstance(placement, Placement) else "causal"


class TransformerTask(Task):
    """Next-code likelihood of `codes` `(n, N)` of classes `labels` `(n,)`.

    Args:
        network: to be trained, in place; parameters without gradient stay as they are.
        attends: the attention of a step is one of these, drawn evenly.
        teacher: whose distribution, with a full cache, the loss draws to.
        distil: weight of that: `(1 − distil) · NLL + distil · KL(teacher ‖ network)`.
    """

    def __init__(
        self,
        settings: ModelSettings,
        network: Transformer,
        labels: Tensor,
        codes: Tensor,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attends: Sequence[Attend] = (causal,),
        teacher: Transformer | None = None,
        distil: float = 0.0,
    ) -> None:
        self.settings, self.seed, self.dtype, self.attends = settings, seed, dtype, attends
        self.labels, self.codes = labels, codes.long()
        self.steps, self.warmup = settings.steps, settings.warmup
        self.network: Transformer = network
        self.teacher, self.distil = teacher, distil
        self.optimizers = self._optimizers(network.shape)

    def _optimizers(self, shape: TransformerShape) -> list[torch.optim.Optimizer]:
        matrices, fused, rest = [], [], []
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith("wqkv.weight"):
                fused.append(parameter)
            elif name.startswith("layers.") and name.endswith(".weight") and parameter.ndim == 2:
                matrices.append(parameter)
            else:
                rest.append(parameter)
        kv_rows = shape.kv_heads * shape.head_dim
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": fused, "split": [shape.dim, kv_rows, kv_rows]},
        ]
        muon = [Muon(groups, lr=self.settings.muon_rate)] if matrices or fused else []
        rate, betas = self.settings.adamw_rate, (0.9, 0.95)
        adamw = [torch.optim.AdamW(rest, lr=rate, betas=betas, weight_decay=0.0)] if rest else []
        return [*muon, *adamw]

    def fingerprint(self) -> list[Any]:
        teacher = [] if self.teacher is None else self.teacher.state_dict().values()
        return [
            self.settings.model_dump(mode="json"),
            self.seed,
            str(self.dtype),
            self.distil,
            digest([self.labels, self.codes, *teacher]),
            [_limit(attend) for attend in self.attends],
        ]

    def loss(self, step: int) -> Tensor:
        rows = batch_indices(len(self.codes), self.settings.batch, step, self.seed)
        codes, labels = self.codes[rows], self.labels[rows]
        generator = step_generator(self.seed + 1, step)
        dropped = torch.rand(len(labels), generator=generator) < self.settings.class_dropout
        labels = labels.masked_fill(dropped, self.network.null_class)
        attend = self.attends[int(torch.randint(len(self.attends), (), generator=generator))]
        device = self.network.norm.weight.device
        codes, labels = codes.to(device), labels.to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network.teacher_forced(labels, codes, attend)
        logits = logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, codes.flatten())
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = self.teacher.teacher_forced(labels, codes).float().flatten(0, 1)
        divergence = F.kl_div(
            logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
        )
        return (1 - self.distil) * loss + self.distil * divergence
