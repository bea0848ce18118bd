"""Training of the classifier whose features FID is measured in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines import machine
from fewlines.config.settings import ClassifierSettings
from fewlines.files import digest
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.training.loop import WHOLE, Objective, draw_rows
from fewlines.training.parallel import Share


class ClassifierObjective(Objective):
    """Cross-entropy of `labels` `(n,)` for `images` `(n, C, H, W)` uint8."""

    def __init__(
        self, settings: ClassifierSettings, images: Tensor, labels: Tensor, seed: int
    ) -> None:
        self.settings, self.images, self.labels, self.seed = settings, images, labels, seed
        self.steps, self.batch, self.warmup = settings.steps, settings.batch, 20
        shape = ClassifierShape(
            images.shape[1], settings.widths, settings.features, int(labels.max()) + 1
        )
        with torch.random.fork_rng(devices=[]):  # layers initialise themselves globally
            torch.manual_seed(seed)
            self.network: Classifier = Classifier(shape)
        self.network.to(memory_format=torch.channels_last).to(machine.device())
        self.optimizers = [
            torch.optim.AdamW(self.network.parameters(), settings.learning_rate, weight_decay=0.01)
        ]

    def fingerprint(self) -> list[Any]:
        """Settings, seed and data."""
        return [
            self.settings.model_dump(mode="json"),
            self.seed,
            digest([self.images, self.labels]),
        ]

    def compute_loss(self, step: int, share: Share = WHOLE) -> Tensor:
        """Compute the loss of one step."""
        rows = share.of(draw_rows(len(self.labels), self.batch, step, self.seed))
        images, labels = (each[rows].to(machine.device()) for each in (self.images, self.labels))
        _, logits = self.network(images)
        return F.cross_entropy(logits, labels)


@torch.no_grad()
def measure_accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch: int) -> float:
    """Measure the share of images `(n, C, H, W)` whose class `(n,)` is found."""
    device = next(classifier.parameters()).device
    guesses = [classifier(part.to(device))[1].argmax(-1).cpu() for part in images.split(batch)]
    return (torch.cat(guesses) == labels).float().mean().item()
