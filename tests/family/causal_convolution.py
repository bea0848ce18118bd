"""A second family of models, in a package of its own: a causal convolution over tokens.

It has no keys and values. What it keeps of an image while it draws is its receptive field, the
codes of the last few tokens. So it has no calibration, no policies, no adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewlines.models.base import Model, ModelSettings, State, TokenSpec
from fewlines.schema import Positive


@dataclass(frozen=True)
class ConvolutionShape:
    """Channels, and how many tokens back it looks."""

    channels: int
    reach: int
    codes: int
    classes: int
    grid: tuple[int, int]


class ConvolutionSettings(ModelSettings):
    """The keys of `model` for this family."""

    channels: Positive = Field(16, description="of the hidden layer")
    reach: Positive = Field(20, description="tokens back")

    def make_shape(self, spec: TokenSpec) -> ConvolutionShape:
        return ConvolutionShape(self.channels, self.reach, spec.codes, spec.classes, spec.grid)


class CausalConvolution(Model):
    """One convolution over the embedded codes before a token, and the class."""

    name = "causal-convolution"
    Settings = ConvolutionSettings
    Shape = ConvolutionShape

    def __init__(self, shape: ConvolutionShape) -> None:
        super().__init__()
        self.shape = shape
        self.label = nn.Embedding(shape.classes + 1, shape.channels)
        self.code = nn.Embedding(shape.codes, shape.channels)
        self.mix = nn.Conv1d(shape.channels, shape.channels, shape.reach)
        self.output = nn.Linear(shape.channels, shape.codes)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def predict(self, labels: Tensor, before: Tensor) -> Tensor:
        """Logits `(B, T, V)` after each run of `reach` embedded codes of `(B, T + reach − 1,
        C)`."""
        mixed = self.mix(before.transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.output(F.relu(mixed + self.label(labels)[:, None]))
        return logits

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        before = F.pad(self.code(codes[:, :-1]), (0, 0, self.shape.reach, 0))
        return self.predict(labels, before)

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        return ReceptiveField(self, rows)


class ReceptiveField(State):
    """The last embedded codes of each row."""

    def __init__(self, model: CausalConvolution, rows: int) -> None:
        self.model = model
        shape = (rows, model.shape.reach, model.shape.channels)
        self.kept = torch.zeros(shape, device=model.device, dtype=model.dtype)

    @property
    def bytes(self) -> int:
        return self.kept.nbytes

    def start(self, labels: Tensor) -> Tensor:
        self.labels = labels
        return self.model.predict(labels, self.kept)[:, -1]

    def advance(self, step: int) -> None:
        self.position = step

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        self.kept = torch.cat([self.kept[:, 1:], self.model.code(codes)[:, None]], dim=1)
        return self.model.predict(self.labels, self.kept)[:, -1]
