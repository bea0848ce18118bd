"""The transformer's decode engine: its weights cast and packed once, not at every step, what lies
between the products compiled (`kernels`, on a GPU `triton_kernels`), and the buffers of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines import machine
from fewlines.attention.attend import Attend
from fewlines.attention.buffer import BoundedCache, Engine
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.models.base import State
from fewlines.models.llamagen import kernels
from fewlines.models.llamagen.model import Attention, Block, FeedForward, Transformer

Pack = Callable[[Tensor], "PackedLinear"]
Rotate = Callable[[Tensor, int, Tensor], None]
Swiglu = Callable[[Tensor], Tensor]


class KVState(State):
    """Keys and values of a batch, in buffers that never hold more than the cache allows."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        cache: Cache | Schedule,
        storage: torch.dtype | None = None,
        engine: Engine = "lean",
    ) -> None:
        """Make the buffers.

        Args:
            model: as it is, or `prepare`d, which is faster.
            rows: of the batch.
            cache: what stays resident.
            storage: what keys and values are kept in; the model's own precision where None.
            engine: how a full cache is read, see `BoundedCache`.
        """
        self.model = model
        self.buffers = BoundedCache(
            cache.plan(model.geometry),
            rows,
            model.shape.head_dim,
            storage or model.dtype,
            model.device,
            engine,
        )

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.buffers.bytes

    @property
    def signature(self) -> tuple[object, ...]:
        """What the host decides of a step."""
        return self.buffers.signature

    def start(self, labels: Tensor) -> Tensor:
        """Read the prefix; logits `(B, V)` of the first token."""
        logits: Tensor = self.model(self.model.embed_labels(labels), 0, self.buffers)
        return logits[:, -1]

    def advance(self, step: int) -> None:
        """Go to image token `step`."""
        self.buffers.advance(step)
        self.position = self.buffers.position

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        logits: Tensor = self.model(self.model.embed_codes(codes[:, None]), position, self.buffers)
        return logits[:, -1]


class PackedLinear(nn.Module):
    """A linear layer without bias that multiplies in `dtype` and answers in its input's.

    On the CPU oneDNN lays the weights out for products of `rows` rows: at a few rows 1.3 to 3
    times faster than `F.linear`, which does so at every call. A single float32
    row is the exception: MKL's matrix-vector product is the faster one.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.packed = weight.device.type == "cpu" and machine.onednn_takes(dtype)
        self.packed &= dtype != torch.float32 or rows > 1
        weight = weight.detach().to(dtype)
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the module that it stands for."""
        given = x.to(self.dtype)
        y: Tensor = (
            torch.ops.mkldnn._linear_pointwise(given, self.weight, None, "none", [], "")
            if self.packed
            else F.linear(given, self.weight)
        )
        return y.to(x.dtype)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Add the answer to a contiguous `total`, in place and in one kernel: on a GPU."""
        total.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.t())
        return total


class CompiledNorm(nn.Module):
    """`RMSNorm`, one compiled pass."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the module that it stands for."""
        out = torch.empty_like(x)
        flat = (x.flatten(0, 1).numpy(), self.weight.numpy(), self.eps, out.flatten(0, 1).numpy())
        kernels.rms_norm(*flat)
        return out


class PackedAttention(nn.Module):
    """`Attention`, its queries and keys turned in place."""

    def __init__(self, attention: Attention, pack: Pack, rotate: Rotate) -> None:
        super().__init__()
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim, self.rotate = attention.head_dim, rotate
        self.wqkv, self.wo = pack(attention.wqkv.weight), pack(attention.wo.weight)

    def mix(self, layer: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """What the heads answer, side by side, `(B, T, dim)`."""
        B, T, _ = x.shape
        qkv = self.wqkv(x).view(B, T, -1, self.head_dim)
        self.rotate(qkv, self.heads + self.kv_heads, rotation)
        q, k, v = qkv.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return attend(layer, q, k, v).transpose(1, 2).reshape(B, T, -1)

    def forward(self, layer: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """Compute as the module that it stands for."""
        out: Tensor = self.wo(self.mix(layer, x, rotation, attend))
        return out


class PackedFeedForward(nn.Module):
    """`FeedForward`, its two input matrices as one."""

    def __init__(self, feed_forward: FeedForward, pack: Pack, swiglu: Swiglu) -> None:
        super().__init__()
        both = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
        self.w13, self.w2 = pack(both), pack(feed_forward.w2.weight)
        self.swiglu = swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the module that it stands for."""
        out: Tensor = self.w2(self.swiglu(self.w13(x)))
        return out


class FusedBlock(nn.Module):
    """`Block` on a GPU, whose products add themselves to what comes in, which is changed."""

    def __init__(self, block: Block, ready: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.attention: Any = ready(block.attention)
        self.feed_forward: Any = ready(block.feed_forward)
        self.attention_norm, self.ffn_norm = ready(block.attention_norm), ready(block.ffn_norm)

    def forward(self, layer: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """Compute as the module that it stands for."""
        x = x.contiguous()
        answers = self.attention.mix(layer, self.attention_norm(x), rotation, attend)
        x = self.attention.wo.add_to(x, answers)
        hidden = self.feed_forward.swiglu(self.feed_forward.w13(self.ffn_norm(x)))
        out: Tensor = self.feed_forward.w2.add_to(x, hidden)
        return out


def rotate_compiled(qkv: Tensor, heads: int, rotation: Tensor) -> None:
    """Turn by `kernels.rotate`."""
    kernels.rotate(qkv.flatten(0, 1).numpy(), heads, rotation.numpy())


def swiglu_compiled(both: Tensor) -> Tensor:
    """Compute by `kernels.swiglu`, in float32."""
    hidden = torch.empty(*both.shape[:-1], both.shape[-1] // 2)
    kernels.swiglu(both.flatten(0, 1).numpy(), hidden.flatten(0, 1).numpy())
    return hidden


def swiglu_plain(both: Tensor) -> Tensor:
    """Compute by torch's operators."""
    a, b = both.chunk(2, dim=-1)
    return F.silu(a) * b


def prepare(
    model: Transformer, dtype: torch.dtype, rows: int, *, consume: bool = False
) -> Transformer:
    """Make a twin for decoding whose linear layers are packed; between them stays what is there,
    float32 as a rule. On a GPU all of it is in `dtype`, as public code has it: casting to and fro
    takes longer there than the products. What its layers are given, they change there.

    Args:
        model: the weights.
        dtype: what linear layers multiply in.
        rows: that are decoded at once.
        consume: take the weights out of `model` as they are packed, so that there is never more
            than one copy of them; the given model is then of no more use.
    """
    on_cpu = model.device.type == "cpu"
    compiled = on_cpu and model.dtype == torch.float32
    fused = model.device.type == "cuda" and machine.has_triton()
    rotate, swiglu = rotate_compiled, swiglu_compiled if compiled else swiglu_plain
    if fused:
        from fewlines.models.llamagen.triton_kernels import rotate, swiglu

    def pack(weight: Tensor) -> PackedLinear:
        return PackedLinear(weight, dtype, rows)

    def ready(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            made: nn.Module = pack(module.weight)
        elif compiled and isinstance(module, nn.RMSNorm):
            made = CompiledNorm(module)
        elif (compiled or fused) and isinstance(module, Attention):
            made = PackedAttention(module, pack, rotate)
        elif isinstance(module, FeedForward):
            made = PackedFeedForward(module, pack, swiglu)
        elif fused and isinstance(module, Block):
            return FusedBlock(module, ready)
        else:
            made = copy.copy(module)
            made._modules = {name: ready(child) for name, child in module.named_children()}
            if not on_cpu:
                held = dict(module.named_parameters(recurse=False))
                made._parameters = {name: _frozen(held[name].to(dtype)) for name in held}
            return made
        if consume:
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.data = torch.empty(0)
        return made

    twin = ready(model)
    assert isinstance(twin, Transformer)
    return twin


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)
