"""A small convolutional classifier: the in-domain feature extractor of FID, KID and IS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassifierShape:
    """Attributes: `channels` of an image, `widths` of the stages (each halves the side),
    `features` of the last hidden layer, `classes`."""

    channels: int
    widths: tuple[int, ...]
    features: int
    classes: int


class Classifier(nn.Module):
    """Images `(B, C, H, W)` uint8 → features `(B, F)` and logits `(B, K)`."""

    Shape = ClassifierShape

    def __init__(self, shape: ClassifierShape) -> None:
        super().__init__()
        self.shape = shape
        layers: list[nn.Module] = []
        before = shape.channels
        for width in shape.widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Linear(4 * before, shape.features)
        self.output = nn.Linear(shape.features, shape.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, F)` and logits `(B, K)` of images `(B, C, H, W)` uint8."""
        hidden = self.body(images.float() / 127.5 - 1)
        features = torch.relu(self.features(hidden))
        return features, self.output(features)
