"""Training of the autoregressive model: the likelihood of the next code, and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.plan import EvictionPlan
from fewlines.files import digest
from fewlines.models.base import Model, ModelSettings
from fewlines.training.loop import WHOLE, Objective, draw_rows, make_generator
from fewlines.training.muon import Muon
from fewlines.training.parallel import Share


def build_model(family: type[Model], shape: Any, seed: int) -> Model:
    """Build an untrained model, the same for the same seed."""
    network = family(shape)
    network.initialise(make_generator(seed, 0))
    return network


class ModelObjective(Objective):
    """The likelihood of codes, given their class and those before."""

    def __init__(
        self,
        settings: ModelSettings,
        network: Model,
        labels: Tensor,
        codes: Tensor,
        seed: int,
        dtype: torch.dtype = torch.float32,
        memories: Sequence[Any] = (None,),
        teacher: Model | None = None,
        distil: float = 0.0,
    ) -> None:
        """Make the optimisers.

        Args:
            settings: steps, batch and rates.
            network: to be trained, in place; parameters without gradient stay as they are.
            labels: class numbers `(n,)`.
            codes: `(n, N)`.
            seed: of all randomness.
            dtype: of the products.
            memories: what `Model.limit` makes of caches; one is drawn for each step, evenly.
            teacher: whose distribution, with a full cache, the loss draws to.
            distil: weight of that: `(1 − distil) · NLL + distil · KL(teacher ‖ network)`.
        """
        self.settings, self.seed, self.dtype, self.memories = settings, seed, dtype, memories
        self.labels, self.codes = labels, codes
        self.steps, self.batch, self.warmup = settings.steps, settings.batch, settings.warmup
        self.network: Model = network
        self.teacher, self.distil = teacher, distil
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in network.group_parameters():
            if group["params"]:
                groups[group.pop("optimizer")].append(group)
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups["muon"]:
            self.optimizers.append(Muon(groups["muon"], settings.muon_rate, precision=dtype))
        if groups["adamw"]:
            rate, betas = settings.adamw_rate, (0.9, 0.95)
            adamw = torch.optim.AdamW(groups["adamw"], lr=rate, betas=betas, weight_decay=0.0)
            self.optimizers.append(adamw)

    def fingerprint(self) -> list[Any]:
        """Settings, seed, precision, loss, data and caches in the loop."""
        teacher = [] if self.teacher is None else self.teacher.state_dict().values()
        return [
            self.settings.model_dump(mode="json"),
            self.seed,
            str(self.dtype),
            self.distil,
            digest([self.labels, self.codes, *teacher]),
            [_describe(memory) for memory in self.memories],
        ]

    def compute_loss(self, step: int, share: Share = WHOLE) -> Tensor:
        """Likelihood, and divergence from the teacher if there is one."""
        rows = draw_rows(len(self.codes), self.settings.batch, step, self.seed)
        codes, labels = self.codes[rows].long(), self.labels[rows]
        generator = make_generator(self.seed + 1, step)
        dropout = self.settings.class_dropout if self.network.has_null_class else 0.0
        dropped = torch.rand(len(labels), generator=generator) < dropout
        labels = labels.masked_fill(dropped, self.network.null_class)
        memory = self.memories[int(torch.randint(len(self.memories), (), generator=generator))]
        device = self.network.device
        codes, labels = share.of(codes).to(device), share.of(labels).to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network.teacher_forced(labels, codes, memory)
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


def _describe(memory: Any) -> str:
    """What tells one limit from another."""
    plan = getattr(memory, "plan", None)
    return plan.fingerprint if isinstance(plan, EvictionPlan) else "full"
