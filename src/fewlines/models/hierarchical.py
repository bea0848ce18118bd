"""Coarse to fine over codes, read top to bottom: the subsampled image first, as in Multi-Scale
PixelRNN (arXiv 1601.06759, 3.6; after it 1703.03664 and 1812.01608).

Every second token of every second line comes first; the others follow, line by line, each given
the coarse tokens around it by one convolution. The product of both is the likelihood of the same
tokens. Attention reaches a few lines back in both levels, so a few lines of a level are kept at a
time, and the coarse tokens.
"""

from __future__ import annotations

import bisect
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
    """Coarse to fine (after arXiv 1601.06759, 1703.03664 and 1812.01608)."""

    family: str = Field("hierarchical", description="the model family")
    dim: Positive = Field(192, description="width of both levels; a multiple of 4 × heads")
    coarse_layers: Positive = Field(2, description="layers of the first level")
    layers: Positive = Field(4, description="layers of the second level")
    heads: Positive = Field(3, description="heads of a layer")
    lines: Positive = Field(
        3, description="of tokens that attention reaches back in each level, `w` fine, `w/2` coarse"
    )

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
    any_grid = False
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
        self.around = nn.Conv2d(shape.dim, shape.dim, 3, padding=(0, 1))
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

    def look_around(self, coarse: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Make of the coarse codes `(B, Nc)` what fine ones are given, `(B, T, dim)`: those in the
        squares of coarse lines from `first` up to before `last`."""
        last = self.shape.coarse_grid[0] if last is None else last
        image = self.coarse.code(coarse).unflatten(1, self.shape.coarse_grid).movedim(-1, 1)
        around = self.around(F.pad(image, (0, 0, 1, 1))[:, :, first : last + 2]).relu()
        given = self.given(around.movedim(1, -1)).unflatten(-1, (4, -1))
        fine = self.shape.places[1].to(coarse.device)
        row, column = fine // self.shape.grid[1], fine % self.shape.grid[1]
        wanted = (row // 2 >= first) & (row // 2 < last)
        row, column = row[wanted], column[wanted]
        chosen: Tensor = given[:, row // 2 - first, column // 2, row % 2 * 2 + column % 2]
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
        """Begin a batch, with a few lines of a level."""
        return LevelsState(self, rows, how.get("storage"))

    def count_read_bytes(self, cache: Any, rows: int, storage: torch.dtype) -> float:
        """Count the bytes that a token reads, the mean over an image: the class and the window of
        its own level, as far as it is written, and a fine one what it is given."""
        width, levels = self.shape.dim, (self.coarse, self.fine)
        entries = sum(
            len(level.layers) * (1 + min(token, level.window))
            for level in levels
            for token in range(level.tokens)
        )
        given = self.fine.tokens * width * self.dtype.itemsize
        return rows * (2 * width * entries * storage.itemsize + given) / self.spec.n_tokens

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the matrices of the blocks and of what the fine level is given, AdamW for
        everything else."""
        width = self.shape.dim
        split = {"wqkv": [width] * 3, "given": [width] * 4}
        return self.group_for_muon(split, also=("around", "given"))


class LevelState:
    """Keys and values of a level: the class, and a ring of the last tokens."""

    def __init__(self, level: Level, kept: Tensor) -> None:
        """Take a level's part of a buffer.

        Args:
            level: whose they are.
            kept: `(rows, n)`, as many numbers as it needs or more.
        """
        rows, numbers = len(kept), count_numbers(level)
        head = level.layers[0].attention.head_dim
        sizes = (2, len(level.layers), rows, level.heads, -1, head)
        both = kept.view(-1)[: rows * numbers].view(sizes)
        self.level = level
        self.first, self.ring = both[..., :1, :], both[..., 1:, :]

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


def count_numbers(level: Level) -> int:
    """Count the numbers that a level keeps of an image."""
    width: int = level.output.in_features
    kept = 1 + min(level.window, max(0, level.tokens - 1))
    return 2 * width * len(level.layers) * kept


class LevelsState(State):
    """A few lines of keys and values of one level after the other, in the same buffer, the coarse
    codes and what the fine ones of two lines are given, for each row of the batch

        `2 · dim · max L · (1 + min(W, N − 1)) + dim · T`

    numbers, of levels of `L` layers, `N` tokens and a window of `W`, and `T` fine tokens of two
    lines; and 8 bytes for each coarse code.
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
        levels = (model.coarse, model.fine)
        most = max(count_numbers(level) for level in levels)
        self.kept = like.new_zeros(rows, most, dtype=storage or model.dtype)
        self.coarse, self.fine = (LevelState(level, self.kept) for level in levels)
        self.codes = like.new_zeros(rows, model.coarse.tokens, dtype=torch.long)
        # How many fine tokens stand in the squares of the coarse lines so far.
        lines = model.shape.places[1] // (2 * model.shape.grid[1])
        self.ends = lines.bincount(minlength=model.shape.coarse_grid[0]).cumsum(0).tolist()
        self.given = like.new_zeros(rows, self.ends[0], model.shape.dim)

    @property
    def bytes(self) -> int:
        """Bytes of all that is kept."""
        return self.kept.nbytes + self.codes.nbytes + self.given.nbytes

    def start(self, labels: Tensor) -> Tensor:
        """Read the class; logits `(B, V)` of the first coarse token."""
        self.labels = labels
        return self.coarse.predict(self.model.label(labels), 0)

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        step, coarse = int(position), self.codes.shape[1]
        if step < coarse:
            self.codes[:, step] = codes
            if step + 1 < coarse:
                return self.coarse.predict(self.model.coarse.code(codes), step + 1)
            return self._predict_fine(self.model.label(self.labels), 0)
        return self._predict_fine(self.model.fine.code(codes), step + 1 - coarse)

    def _predict_fine(self, before: Tensor, token: int) -> Tensor:
        line = bisect.bisect_right(self.ends, token)
        first = self.ends[line - 1] if line else 0
        if token == first:
            given = self.model.look_around(self.codes, line, line + 1)
            self.given[:, : given.shape[1]] = given
        return self.fine.predict(before + self.given[:, token - first], token)
