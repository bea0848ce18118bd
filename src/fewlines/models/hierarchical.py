"""Coarse to fine (after arXiv 1703.03664 and 1812.01608) over codes, read top to bottom.

Every second token of every second line comes first; the others follow, line by line, each given
the coarse tokens around it. The product of both is the likelihood of the same tokens. Attention
reaches a few lines back in both levels, so a few lines of each are kept, and the coarse tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewlines.models.base import Model, ModelSettings, ModelShape, State, TokenSpec
from fewlines.models.llamagen.model import Block, rope_2d
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.schema import Positive


@dataclass(frozen=True)
class HierarchicalShape(ModelShape):
    """A shape.

    Attributes:
        dim: width of both levels.
        coarse_layers: of the first level.
        layers: of the second.
        heads: of a layer.
        lines: of tokens that attention reaches back, in both levels.
    """

    dim: Positive
    coarse_layers: Positive
    layers: Positive
    heads: Positive
    lines: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        super().__post_init__()
        _ = self.dense

    @property
    def dense(self) -> TransformerShape:
        """A transformer of such blocks on the whole grid."""
        sizes = (self.dim, self.layers, self.heads, self.heads)
        return TransformerShape(*sizes, self.codes, self.classes, self.grid)

    @property
    def coarse_grid(self) -> tuple[int, int]:
        """Grid of the first level, `(⌈h/2⌉, ⌈w/2⌉)`."""
        return -(-self.grid[0] // 2), -(-self.grid[1] // 2)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the tokens of both levels stand, counted line by line."""
        with torch.device("cpu"):  # whatever the model is made on
            rows, columns = (torch.arange(side) for side in self.grid)
            coarse = ((rows[:, None] % 2 == 0) & (columns % 2 == 0)).flatten()
            return coarse.nonzero()[:, 0], (~coarse).nonzero()[:, 0]


class HierarchicalSettings(ModelSettings):
    """Coarse to fine (after arXiv 1703.03664 and 1812.01608)."""

    family: str = Field("hierarchical", description="the model family")
    dim: Positive = Field(192, description="width of both levels; a multiple of 4 × heads")
    coarse_layers: Positive = Field(2, description="layers of the first level")
    layers: Positive = Field(4, description="layers of the second level")
    heads: Positive = Field(3, description="heads of a layer")
    lines: Positive = Field(3, description="that attention reaches back, in both levels")

    def make_shape(self, spec: TokenSpec) -> HierarchicalShape:
        """Make the shape of the model that is trained on such tokens."""
        sizes = (self.dim, self.coarse_layers, self.layers, self.heads, self.lines)
        return HierarchicalShape(*sizes, **vars(spec))


class Level(nn.Module):
    """A transformer over the tokens of a level: what goes in is the token before and the place of
    the one to come, and attention reaches the class and the last `window` tokens."""

    rotations: Tensor
    layers: Any

    def __init__(self, shape: HierarchicalShape, layers: int, places: Tensor, window: int) -> None:
        super().__init__()
        self.tokens, self.window, self.heads = len(places), window, shape.heads
        self.code = nn.Embedding(shape.codes, shape.dim)
        self.place = nn.Parameter(torch.zeros(self.tokens, shape.dim))
        self.layers = nn.ModuleList(Block(shape.dense) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.output = nn.Linear(shape.dim, shape.codes, bias=False)
        with torch.device("cpu"):
            self.register_buffer("rotations", rope_2d(shape.dense)[1:][places], persistent=False)

    def embed(self, label: Tensor, codes: Tensor, context: Tensor | int) -> Tensor:
        """Embed the class `(B, dim)` and all codes `(B, T)` but the last, for the tokens that they
        come before: `(B, T, dim)`."""
        before = torch.cat([label[:, None], self.code(codes[:, :-1])], dim=1)
        x: Tensor = before[:, : self.tokens] + self.place + context
        return x

    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(B, T, V)` of what has been through all layers."""
        logits: Tensor = self.output(self.norm(x))
        return logits

    def forward(self, label: Tensor, codes: Tensor, context: Tensor | int = 0) -> Tensor:
        """Predict every code `(B, T)` of the level; logits `(B, T, V)`."""
        x, steps = self.embed(label, codes, context), torch.arange(self.tokens)
        back = steps[:, None] - steps
        mask = ((back >= 0) & ((back < self.window) | (steps == 0))).to(x.device)
        rotation = self.rotations.to(torch.promote_types(x.dtype, torch.float32))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        for number, layer in enumerate(self.layers):
            x = layer(number, x, rotation, attend)
        return self.read_out(x)


class Hierarchical(Model):
    """Class numbers and codes, coarse ones first → logits of each code."""

    name = "hierarchical"
    Settings = HierarchicalSettings
    Shape = HierarchicalShape
    engines = ("lean", "naive")
    raster = False
    shape: HierarchicalShape

    def __init__(self, shape: HierarchicalShape) -> None:
        super().__init__()
        self.shape = shape
        coarse, fine = shape.places
        self.label = nn.Embedding(shape.classes + 1, shape.dim)
        width = shape.lines * shape.coarse_grid[1]
        self.coarse = Level(shape, shape.coarse_layers, coarse, width)
        self.fine = Level(shape, shape.layers, fine, shape.lines * shape.grid[1])
        self.around = nn.Conv2d(shape.dim, shape.dim, 3, padding=1)
        self.given = nn.Linear(shape.dim, 4 * shape.dim)  # for each place of a square of four

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of standard deviation 0.02 and outputs of zeros."""
        for name, parameter in self.named_parameters():
            if name.endswith(("output.weight", "bias")):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    @property
    def order(self) -> Tensor:
        """The coarse places, then the others."""
        return torch.cat(self.shape.places)

    def look_around(self, coarse: Tensor) -> Tensor:
        """Make of the coarse codes `(B, Nc)` what the fine ones are given: `(B, Nf, dim)`."""
        image = self.coarse.code(coarse).unflatten(1, self.shape.coarse_grid).movedim(-1, 1)
        given = self.given(self.around(image).relu().movedim(1, -1)).unflatten(-1, (4, -1))
        fine = self.shape.places[1].to(coarse.device)
        row, column = fine // self.shape.grid[1], fine % self.shape.grid[1]
        chosen: Tensor = given[:, row // 2, column // 2, row % 2 * 2 + column % 2]
        return chosen

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code `(B, N)` from those that are drawn before it; logits `(B, N, V)`."""
        coarse, fine = (codes[:, places.to(codes.device)] for places in self.shape.places)
        label = self.label(labels)
        logits = [self.coarse(label, coarse)]
        if fine.shape[1]:
            logits.append(self.fine(label, fine, self.look_around(coarse)))
        return torch.cat(logits, dim=1)[:, self.order.argsort().to(codes.device)]

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        """Begin a batch, with a few lines of both levels."""
        return LevelsState(self, rows, how.get("storage"))

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the blocks' matrices, AdamW for everything else."""
        return self.group_for_muon([self.shape.dim] * 3)


class LevelState:
    """Keys and values of a level: the class, and a ring of the last tokens."""

    def __init__(self, level: Level, rows: int, like: Tensor, storage: torch.dtype) -> None:
        head = level.layers[0].attention.head_dim
        kept = min(level.window, max(0, level.tokens - 1))
        sizes = (2, len(level.layers), rows, level.heads)
        self.level = level
        self.first = like.new_zeros(*sizes, 1, head, dtype=storage)
        self.ring = like.new_zeros(*sizes, kept, head, dtype=storage)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.first.nbytes + self.ring.nbytes

    def predict(self, x: Tensor, token: int) -> Tensor:
        """Logits `(B, V)` of a token, by what comes before it `(B, dim)`."""
        x = (x + self.level.place[token])[:, None]
        rotation = self.level.rotations[token : token + 1]
        rotation = rotation.to(torch.promote_types(x.dtype, torch.float32))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            new = torch.stack([k, v]).to(self.first.dtype)
            first, ring = self.first[:, layer], self.ring[:, layer]
            if token == 0:
                first.copy_(new)
                return F.scaled_dot_product_attention(q, k, v)
            ring[..., (token - 1) % self.level.window, :] = new[..., 0, :]
            keys, values = torch.cat([first, ring[..., :token, :]], dim=3).to(q.dtype)
            return F.scaled_dot_product_attention(q, keys, values)

        for number, layer in enumerate(self.level.layers):
            x = layer(number, x, rotation, attend)
        return self.level.read_out(x)[:, -1]


class LevelsState(State):
    """A few lines of keys and values of both levels, the coarse codes and what the fine ones are
    given, for each row of the batch

        `2 · dim · Σ L · (1 + min(W, N − 1)) + Nf · dim`

    numbers, summed over levels of `L` layers, `N` tokens and a window of `W`, and 8 bytes for each
    coarse code.
    """

    def __init__(self, model: Hierarchical, rows: int, storage: torch.dtype | None = None) -> None:
        """Make the buffers.

        Args:
            model: whose states they hold.
            rows: of the batch.
            storage: what keys and values are kept in; the model's own precision where None.
        """
        self.model = model
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        kept = storage or model.dtype
        self.coarse = LevelState(model.coarse, rows, like, kept)
        self.fine = LevelState(model.fine, rows, like, kept)
        coarse, fine = (len(places) for places in model.shape.places)
        self.codes = like.new_zeros(rows, coarse, dtype=torch.long)
        self.given = like.new_zeros(rows, fine, model.shape.dim)

    @property
    def bytes(self) -> int:
        """Bytes of all that is kept."""
        return self.coarse.bytes + self.fine.bytes + self.codes.nbytes + self.given.nbytes

    def start(self, labels: Tensor) -> Tensor:
        """Read the class; logits `(B, V)` of the first coarse token."""
        self.label = self.model.label(labels)
        return self.coarse.predict(self.label, 0)

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        step, coarse = int(position), self.codes.shape[1]
        if step < coarse:
            self.codes[:, step] = codes
            if step + 1 < coarse:
                return self.coarse.predict(self.model.coarse.code(codes), step + 1)
            self.given.copy_(self.model.look_around(self.codes))
            return self.fine.predict(self.label + self.given[:, 0], 0)
        token = step + 1 - coarse
        return self.fine.predict(self.model.fine.code(codes) + self.given[:, token], token)
