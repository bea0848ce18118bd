"""Sparse Transformer (arXiv 1904.10509) over codes: the dense one, trained with patterns that read
little.

Half of the heads read what is near, the others what is far. *Strided*: the last line of tokens, and
every token that lies whole lines back. *Fixed*: the line so far, and the last columns of every
line. Strided reads little and keeps everything; fixed keeps a few columns too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.models.base import Model, ModelSettings, ModelShape, State, TokenSpec
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.schema import Positive

Pattern = Literal["strided", "fixed"]


@dataclass(frozen=True)
class SparseShape(ModelShape):
    """A shape.

    Attributes:
        pattern: what heads read.
        summary: columns of each line that fixed patterns keep.
        grid: `(h, w)`, tokens of an image; the stride is a line, `w`.
    """

    pattern: Pattern
    summary: Positive
    dim: Positive
    layers: Positive
    heads: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        super().__post_init__()
        _ = self.dense
        if self.heads < 2:
            raise FewlinesError("heads: one reads what is near, one what is far; write 2 or more")

    @property
    def dense(self) -> TransformerShape:
        """The transformer whose attention is limited."""
        sizes = (self.dim, self.layers, self.heads, self.heads)
        return TransformerShape(*sizes, self.codes, self.classes, self.grid)

    @property
    def near(self) -> int:
        """Heads that read what is near, the first ones; the others read what is far."""
        return self.heads - self.heads // 2

    @property
    def kept(self) -> int:
        """Columns of each line that far heads keep."""
        width = self.grid[1]
        return width if self.pattern == "strided" else min(self.summary, width)

    def make_mask(self) -> Tensor:
        """Make what heads read, `(heads, N, N)`: the class stands first, and every head reads it;
        the last token is read by none."""
        tokens, width = torch.arange(self.grid[0] * self.grid[1]), self.grid[1]
        query, key = tokens[:, None] - 1, tokens - 1  # of image tokens; the class is before them
        if self.pattern == "strided":
            near, far = query - key < width, (query - key) % width == 0
        else:
            near, far = query // width == key // width, key % width >= width - self.kept
        heads = torch.arange(self.heads)[:, None, None]
        read = torch.where(heads < self.near, near, far) & (key <= query)
        read[..., 0] = True
        return read


class SparseSettings(ModelSettings):
    """Sparse Transformer (arXiv 1904.10509)."""

    family: str = Field("sparse-transformer", description="the model family")
    pattern: Pattern = Field("strided", description="what heads read, strided or fixed")
    summary: Positive = Field(1, description="columns of each line that fixed patterns keep")
    dim: Positive = Field(192, description="width; a multiple of 4 × heads")
    layers: Positive = Field(6, description="transformer layers")
    heads: Positive = Field(4, description="half of them near, half far")

    def make_shape(self, spec: TokenSpec) -> SparseShape:
        """Make the shape of the model that is trained on such tokens."""
        sizes = (self.pattern, self.summary, self.dim, self.layers, self.heads)
        return SparseShape(*sizes, **vars(spec))


class SparseTransformer(Model):
    """Class numbers and codes in raster order → logits of the next code."""

    name = "sparse-transformer"
    Settings = SparseSettings
    Shape = SparseShape
    shape: SparseShape
    mask: Tensor

    def __init__(self, shape: SparseShape) -> None:
        super().__init__()
        self.shape = shape
        self.dense = Transformer(shape.dense)
        with torch.device("cpu"):
            self.register_buffer("mask", shape.make_mask(), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights of a dense one."""
        self.dense.initialise(generator)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read by the pattern, all positions of `(B, H, T, D)` at once."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code `(B, N)` from those before it; logits `(B, N, V)`."""
        return self.dense.teacher_forced(labels, codes, self.attend)

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        """Begin a batch, with what the pattern still reads."""
        return PatternState(self, rows, how.get("storage"))

    def count_read_bytes(self, cache: Any, rows: int, storage: torch.dtype) -> float:
        """Count the bytes that a token reads, the mean over an image."""
        entries = self.mask.sum((0, 2)).double().mean().item()
        return 2 * rows * self.shape.layers * entries * self.shape.dense.head_dim * storage.itemsize

    def prepare(self, dtype: torch.dtype, rows: int, *, consume: bool = False) -> Model:
        """Pack and compile the dense one for decoding."""
        twin = copy.copy(self)
        twin._modules = {"dense": self.dense.prepare(dtype, rows, consume=consume)}
        return twin

    def group_parameters(self) -> list[dict[str, Any]]:
        """As of a dense one."""
        return self.dense.group_parameters()


class PatternState(State):
    """The keys and values that a pattern still reads, for each row of the batch

        `2 · L · D · (H + n·w + f·h·c)`

    numbers, of `L` layers, `H` heads of width `D`, `n` near and `f` far, on `h` lines of `w` tokens
    of which far heads keep `c`: the class, a line, and the columns.
    """

    def __init__(
        self, model: SparseTransformer, rows: int, storage: torch.dtype | None = None
    ) -> None:
        """Make the buffers.

        Args:
            model: as it is, or `prepare`d, which is faster.
            rows: of the batch.
            storage: what keys and values are kept in; the model's own precision where None.
        """
        self.model, shape = model, model.shape
        self.height, self.width = shape.grid
        head, far = shape.dense.head_dim, shape.heads - shape.near

        def zeros(*sizes: int) -> Tensor:
            kept = storage or model.dtype
            shape_of_buffer = (2, shape.layers, rows, *sizes, head)
            return torch.zeros(shape_of_buffer, device=model.device, dtype=kept)

        self.prefix = zeros(shape.heads, 1)
        self.near = zeros(shape.near, self.width)
        self.far = zeros(far, self.height, shape.kept)
        self.token = -1  # the class

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.prefix.nbytes + self.near.nbytes + self.far.nbytes

    def start(self, labels: Tensor) -> Tensor:
        """Read the class; logits `(B, V)` of the first token."""
        dense = self.model.dense
        logits: Tensor = dense(dense.embed_labels(labels), 0, self._attend)
        return logits[:, -1]

    def advance(self, step: int) -> None:
        """Go to image token `step`."""
        self.token, self.position = step, step + 1

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        dense = self.model.dense
        logits: Tensor = dense(dense.embed_codes(codes[:, None]), position, self._attend)
        return logits[:, -1]

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, shape = torch.stack([k, v]).to(self.prefix.dtype), self.model.shape
        prefix = self.prefix[:, layer]
        if self.token < 0:
            prefix.copy_(new)
            return F.scaled_dot_product_attention(q, k, v)
        line, column = divmod(self.token, self.width)
        near, far = self.near[:, layer], self.far[:, layer]
        near[..., column, :] = new[:, :, : shape.near, 0]
        whole = shape.pattern == "strided" and line > 0
        near = near if whole else near[..., : column + 1, :]
        first = self.width - shape.kept  # column that far heads keep
        if column >= first:
            far[..., line, column - first, :] = new[:, :, shape.near :, 0]
        if shape.pattern == "strided":
            far = far[..., : line + 1, column, :]
        else:
            above = far[..., :line, :, :].flatten(3, 4)
            far = torch.cat([above, far[..., line, : max(0, column - first + 1), :]], dim=3)
        parts = []
        for heads, kept in ((slice(shape.near), near), (slice(shape.near, None), far)):
            keys, values = torch.cat([prefix[:, :, heads], kept], dim=3).to(q.dtype)
            parts.append(F.scaled_dot_product_attention(q[:, heads], keys, values))
        return torch.cat(parts, dim=1)
