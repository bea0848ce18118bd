"""LlamaGen's class-conditional autoregressive transformer (arXiv 2406.06525), read top to bottom.

The architecture and the parameter names are the published ones, so public checkpoints load as
they are. The model knows nothing of caches: whoever calls it passes the attention, which is how
training, the teacher-forced forward under a cache and the decode loop share this one file.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines.attention.attend import Attend, attend_causally
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry
from fewlines.models.base import AttentionModel, Model, State
from fewlines.models.llamagen.cost import Decode, list_linears
from fewlines.models.llamagen.settings import LlamaGenSettings
from fewlines.models.llamagen.shape import SHAPES, TransformerShape


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


class Projection(nn.Module):
    """Features of a caption, as wide as the model."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; shapes as in the published code."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedder(nn.Module):
    """Features of a caption, and those that stand for none."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.cap_proj = Projection(shape.caption_dim, shape.dim)
        self.uncond_embedding = nn.Parameter(torch.zeros(shape.prefix, shape.caption_dim))


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
        """Compute the layer; shapes as in the published code."""
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
        """Compute the layer; shapes as in the published code."""
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
        """Compute the layer; shapes as in the published code."""
        x = x + self.attention(layer, self.attention_norm(x), rotation, attend)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Transformer(AttentionModel):
    """Class numbers and codes in raster order → logits of the next code."""

    name = "llamagen"
    Settings = LlamaGenSettings
    Shape = TransformerShape
    parts = MappingProxyType({"all": "", "attention": ".attention.", "norms": "norm"})
    published = SHAPES
    Cost = Decode
    shape: TransformerShape
    rotations: Tensor

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.caption_dim = shape.caption_dim
        self.cls_embedding: Any = (
            CaptionEmbedder(shape) if shape.caption_dim else LabelEmbedder(shape.classes, shape.dim)
        )
        self.tok_embeddings = _embedding(shape.codes, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.codes, bias=False)
        with torch.device("cpu"):  # meta's operators cost the same seconds
            self.register_buffer("rotations", rope_2d(shape), persistent=False)
        if shape.registers:
            self.registers = nn.Parameter(torch.zeros(shape.registers, shape.dim))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of standard deviation 0.02 and an output of zeros, as published."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Move or cast; angles keep their precision, as there are no complex numbers of 16 bits."""
        super()._apply(fn, recurse)
        if self.rotations.dtype in (torch.float16, torch.bfloat16):
            self.rotations = rope_2d(self.shape).to(self.rotations.device)
        return self

    @property
    def geometry(self) -> Geometry:
        """Grid, prefix, layers and key-value heads."""
        return self.shape.geometry

    @property
    def device(self) -> torch.device:
        """Where its weights lie; norms stay what they are when a model is made ready."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what lies between its products."""
        return self.norm.weight.dtype

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Embed class numbers `(B,)`, or features of captions `(B, P, F)`, → the prefix
        `(B, P, dim)`: the class, then the registers."""
        if self.caption_dim:
            if labels.ndim != 3:
                raise FewlinesError(
                    "this model draws from features of captions, (n, tokens, "
                    f"{self.caption_dim}), not from class numbers: 'fewlines draw --captions'"
                )
            embedded: Tensor = self.cls_embedding.cap_proj(labels.to(self.dtype))
            return embedded
        prefix: Tensor = self.cls_embedding.embedding_table(labels).unsqueeze(1)
        if self.shape.registers:
            prefix = torch.cat([prefix, self.registers.expand(len(labels), -1, -1)], dim=1)
        return prefix

    def blank(self, labels: Tensor) -> Tensor:
        """Make what stands for no condition: of captions, the last features of none."""
        if not self.caption_dim:
            return super().blank(labels)
        nothing: Tensor = self.cls_embedding.uncond_embedding[-labels.shape[1] :]
        return nothing.expand_as(labels)

    def group(self, conditions: Any) -> list[tuple[Model, Tensor, Tensor]]:
        """Group captions by their length: nobody is padded, since a caption has no places."""
        if not self.caption_dim:
            return super().group(conditions)
        lengths = torch.tensor([len(each) for each in conditions])
        groups: list[tuple[Model, Tensor, Tensor]] = []
        for length in lengths.unique().tolist():
            numbers = (lengths == length).nonzero().flatten()
            features = torch.stack([conditions[number] for number in numbers.tolist()])
            groups.append((self.with_prefix(length), features, numbers))
        return groups

    def with_prefix(self, length: int) -> Transformer:
        """Take the same weights for captions of so many features."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)
        twin.shape = replace(self.shape, prefix=length)
        twin.rotations = rope_2d(twin.shape).to(self.rotations)
        return twin

    def with_registers(self, count: int, generator: torch.Generator) -> Transformer:
        """Copy the weights and add registers.

        Args:
            count: how many the copy has; the model itself where it has as many.
            generator: draws them as `initialise` does.
        """
        if count == self.shape.registers:
            return self
        twin = Transformer(replace(self.shape, registers=count))
        twin.initialise(generator)
        twin.load_state_dict({**twin.state_dict(), **self.state_dict()})
        return twin

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed codes `(B, T)` → `(B, T, dim)`."""
        embedded: Tensor = self.tok_embeddings(codes)
        return embedded

    def embed(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Embed the prefix and all codes `(B, N)` but the last → `(B, P + N − 1, dim)`."""
        return torch.cat([self.embed_labels(labels), self.embed_codes(codes[:, :-1])], dim=1)

    def forward(
        self, x: Tensor, start: int | Tensor = 0, attend: Attend = attend_causally
    ) -> Tensor:
        """Predict the next code at some positions.

        Args:
            x: embedded positions `start … start + T − 1`, `(B, T, dim)`.
            start: a tensor `(1,)` stands for one position that a CUDA graph can be replayed at.
            attend: attention over what came before.

        Returns:
            Logits `(B, T, V)`.
        """
        if isinstance(start, Tensor):
            rotation = self.rotations.index_select(0, start)
        else:
            rotation = self.rotations[start : start + x.shape[1]]
        for number, layer in enumerate(self.layers):
            x = layer(number, x, rotation, attend)
        logits: Tensor = self.output(self.norm(x))
        return logits

    def run_layers(
        self, x: Tensor, attend: Attend | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Run the layers `first … last − 1` on all positions `(B, P + N − 1, dim)`."""
        rotation = self.rotations[: x.shape[1]]
        for number in range(first, len(self.layers) if last is None else last):
            x = self.layers[number](number, x, rotation, attend or attend_causally)
        return x

    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(B, N, V)` of what has been through all layers."""
        logits: Tensor = self.output(self.norm(x))
        return logits[:, self.geometry.prefix - 1 :]

    def begin(self, rows: int, cache: Cache | Schedule, **how: Any) -> State:
        """Begin a batch; see `engine.KVState`, which is loaded only where something is drawn."""
        from fewlines.models.llamagen.engine import KVState

        return KVState(self, rows, cache, **how)

    def count_bytes(self, cache: Cache | Schedule, rows: int, storage: torch.dtype) -> float:
        """Count the bytes of keys and values of a batch, as the buffers hold them."""
        if cache.plan(self.geometry).oracle is not None:
            return float("nan")  # not a cache
        return rows * cache.plan(self.geometry).count_bytes(self.shape.head_dim, storage)

    def count_read_bytes(self, cache: Cache, rows: int, storage: torch.dtype) -> float:
        """Count the bytes of keys and values that a token reads, the mean over an image."""
        if cache.plan(self.geometry).oracle is not None:
            return float("nan")  # not a cache
        return Decode(self.shape, rows, cache, self.dtype, storage).average_bytes()

    def prepare(self, dtype: torch.dtype, rows: int, *, consume: bool = False) -> Transformer:
        """Pack and compile for decoding; see `engine.prepare`."""
        from fewlines.models.llamagen.engine import prepare

        return prepare(self, dtype, rows, consume=consume)

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the blocks' matrices, AdamW for everything else."""
        kv_rows = self.shape.kv_heads * self.shape.head_dim
        return self.group_for_muon({"wqkv": [self.shape.dim, kv_rows, kv_rows]})

    def count_training_flops(self) -> float:
        """Count six operations per weight and token of the products, and causal attention; the
        optimiser's are not counted."""
        shape = self.shape
        weights = sum(out * into for out, into in list_linears(shape))
        n = shape.geometry.n_tokens
        return 6.0 * n * weights + 6 * shape.layers * n * n * shape.dim

    @property
    def has_null_class(self) -> bool:
        """Whether it can draw without a class."""
        return self.shape.has_null_class

    @classmethod
    def read_checkpoint(cls, path: Path, **how: Any) -> Transformer:
        """Read weights that LlamaGen published; see `checkpoint.load_checkpoint`."""
        from fewlines.models.llamagen.checkpoint import load_checkpoint

        return load_checkpoint(path, **how)

    @classmethod
    def draw(
        cls, shape: TransformerShape, precision: torch.dtype, generator: torch.Generator
    ) -> Transformer:
        """Make a model whose weights are one random row, repeated: for measuring cost.

        Args:
            shape: of the model.
            precision: of its matrices, so that a large one is never held twice.
            generator: draws the row.
        """
        with torch.device("meta"):
            model = cls(shape)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(precision)
        model.to_empty(device="cpu")
        model.rotations = rope_2d(shape)
        for parameter in model.parameters():
            row = torch.randn(parameter.shape[-1], generator=generator) * 0.02
            parameter.data.copy_(row)
        return model.eval().requires_grad_(False)


def rope_2d(shape: TransformerShape) -> Tensor:
    """Make the rotations `(P + N, D/2, 2)`, cosines and sines: rows turn the first half of a head,
    columns the second. The condition's are zeros, so that its rotated queries and keys are zero
    vectors; registers are not turned."""
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
    """Turn the interleaved pairs of `(B, T, H, D)` by `(T, D/2, 2)`, as complex numbers."""
    pairs = torch.view_as_complex(x.to(rotation.dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rotation)[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x)
