"""LlamaGen's class-conditional autoregressive transformer (arXiv 2406.06525), read top to bottom.

The architecture and the parameter names are the published ones, so public checkpoints load as
they are. The model knows nothing of caches: whoever calls it passes the attention, which is how
training, the teacher-forced forward under a cache and the decode loop share this one file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines.cache.geometry import Geometry


@dataclass(frozen=True)
class TransformerShape:
    """Attributes: see LlamaGen; `grid` is the image's `(h, w)` tokens, `classes` excludes the
    null class that stands for 'no condition', `prefix` counts the condition's tokens, `registers`
    the learned ones after them, which every cache keeps (arXiv 2309.16588, 2309.17453)."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    codes: int
    classes: int
    grid: tuple[int, int]
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    prefix: int = 1
    registers: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer: the next multiple of `int(2·4·dim/3)`."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of

    @property
    def geometry(self) -> Geometry:
        prefix = self.prefix + self.registers
        return Geometry(self.grid, prefix, layers=self.layers, heads=self.kv_heads)


class Attend(Protocol):
    """Attention over whatever the caller keeps.

    Takes the layer's number, queries `(B, Hq, T, D)` and new keys and values `(B, H, T, D)`, all
    rotated already; returns `(B, Hq, T, D)`.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees itself and all before it."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """Zeros, until `initialise` or a file fills it: torch's own numbers would be drawn in vain, and
    on the meta device they cost a process seconds of imports."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.zeros(rows, dim), freeze=False)
    return table


class LabelEmbedder(nn.Module):
    """A row for each class, and one for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = _embedding(classes + 1, dim)


class Attention(nn.Module):
    """Queries, keys and values of a layer, rotated, and what `attend` makes of them."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.wqkv = nn.Linear(
            shape.dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False
        )
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, layer: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        qkv = self.wqkv(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
        rotated, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        rotated = rotate(rotated, rotation)
        q, k = rotated.split([self.heads, self.kv_heads], dim=2)
        y = attend(layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.wo(y.transpose(1, 2).reshape(B, T, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, layer: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(layer, self.attention_norm(x), rotation, attend)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Transformer(nn.Module):
    """Class numbers and codes in raster order → logits of the next code."""

    rotations: Tensor

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.cls_embedding = LabelEmbedder(shape.classes, shape.dim)
        self.tok_embeddings = _embedding(shape.codes, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.codes, bias=False)
        with torch.device("cpu"):  # meta's operators cost the same seconds
            self.register_buffer("rotations", rope_2d(shape), persistent=False)
        if shape.registers:
            self.registers = nn.Parameter(torch.zeros(shape.registers, shape.dim))

    def initialise(self, generator: torch.Generator) -> None:
        """Normal weights of standard deviation 0.02 and an output of zeros, as published."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    @property
    def null_class(self) -> int:
        return self.shape.classes

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Class numbers `(B,)` → the prefix `(B, P, dim)`: the class, then the registers."""
        prefix: Tensor = self.cls_embedding.embedding_table(labels).unsqueeze(1)
        if self.shape.registers:
            prefix = torch.cat([prefix, self.registers.expand(len(labels), -1, -1)], dim=1)
        return prefix

    def with_registers(self, count: int, generator: torch.Generator) -> Transformer:
        """The same weights, with `count` registers, new ones, as `initialise` makes them."""
        if count == self.shape.registers:
            return self
        twin = Transformer(replace(self.shape, registers=count))
        twin.initialise(generator)
        twin.load_state_dict({**twin.state_dict(), **self.state_dict()})
        return twin

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes `(B, T)` → `(B, T, dim)`."""
        embedded: Tensor = self.tok_embeddings(codes)
        return embedded

    def embed(self, labels: Tensor, codes: Tensor) -> Tensor:
        """The prefix and all codes `(B, N)` but the last → `(B, P + N − 1, dim)`."""
        return torch.cat([self.embed_labels(labels), self.embed_codes(codes[:, :-1])], dim=1)

    def forward(
        self, x: Tensor, start: int | Tensor = 0, attend: Attend = causal, since: int = 0
    ) -> Tensor:
        """Embedded positions `start … start+T−1`, `(B, T, dim)` → logits `(B, T, V)`. A start in a
        tensor `(1,)` stands for one position that a CUDA graph can be replayed at. What has been
        through the first layers enters at the layer `since`."""
        if isinstance(start, Tensor):
            rotation = self.rotations.index_select(0, start)
        else:
            rotation = self.rotations[start : start + x.shape[1]]
        for layer in range(since, len(self.layers)):
            x = self.layers[layer](layer, x, rotation, attend)
        logits: Tensor = self.output(self.norm(x))
        return logits

    def teacher_forced(self, labels: Tensor, codes: Tensor, attend: Attend = causal) -> Tensor:
        """Logits `(B, N, V)` of codes `(B, N)`, each given its class and those before."""
        out: Tensor = self(self.embed(labels, codes), 0, attend)
        return out[:, self.shape.geometry.prefix - 1 :]


def rope_2d(shape: TransformerShape) -> Tensor:
    """Rotations `(P + N, D/2, 2)`, cosines and sines: rows turn the first half of a head, columns
    the second. The condition's are zeros, so that its rotated queries and keys are zero vectors;
    registers are not turned."""
    height, width = shape.grid
    half = shape.head_dim // 2
    frequencies = 1.0 / shape.rope_base ** (torch.arange(0, half, 2).float() / half)  # (D/4,)
    by_row = torch.outer(torch.arange(height).float(), frequencies)
    by_column = torch.outer(torch.arange(width).float(), frequencies)
    angles = torch.cat(
        [
            by_row[:, None].expand(height, width, -1),
            by_column[None, :].expand(height, width, -1),
        ],
        dim=-1,
    ).flatten(0, 1)  # (N, D/2)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    registers = torch.tensor([1.0, 0.0]).expand(shape.registers, half, 2)
    return torch.cat([torch.zeros(shape.prefix, half, 2), registers, image])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the interleaved pairs of `(B, T, H, D)` by `(T, D/2, 2)`, as complex numbers."""
    pairs = torch.view_as_complex(x.to(rotation.dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rotation)[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x)
