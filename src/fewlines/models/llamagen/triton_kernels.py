"""What lies between the products of a decode step, for a GPU: one kernel each in place of two or
three, as replaying a kernel takes a microsecond or two, which is longer than its work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # elements of a program


@triton.jit
def _rotate(
    qkv, rotation, T, heads, row_stride,
    D: tl.constexpr, D2: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, D2)
    angle = tl.load(rotation + row % T * D + d, mask=d < D, other=0.0)
    cos, sin = tl.split(tl.reshape(angle, (1, D2 // 2, 2)))
    place, real = qkv + row * row_stride + head * D + d[None, :], (head < heads) & (d < D)[None, :]
    pairs = tl.load(place, mask=real, other=0.0).to(angle.dtype)
    a, b = tl.split(tl.reshape(pairs, (HEADS, D2 // 2, 2)))
    turned = tl.join(a * cos - b * sin, a * sin + b * cos)
    tl.store(place, tl.reshape(turned, (HEADS, D2)).to(qkv.dtype.element_ty), mask=real)


def rotate(qkv: Tensor, heads: int, rotation: Tensor) -> None:
    """Turn the first `heads` heads of `(B, T, heads, D)` in place, pair by pair, by their
    position's `(T, D/2, 2)`."""
    rows, D = qkv.flatten(0, 1), qkv.shape[-1]
    wide = triton.next_power_of_2(D)
    at_once = max(min(BLOCK // wide, triton.next_power_of_2(heads)), 1)
    _rotate[(len(rows), triton.cdiv(heads, at_once))](
        rows, rotation, len(rotation), heads, rows.stride(0), D=D, D2=wide, HEADS=at_once,
        num_warps=1,
    )  # fmt: skip


@triton.jit
def _swiglu(both, out, hidden, ACC: tl.constexpr, SIZE: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    a = tl.load(both + row * 2 * hidden + d, mask=d < hidden, other=0.0).to(ACC)
    b = tl.load(both + row * 2 * hidden + hidden + d, mask=d < hidden, other=0.0).to(ACC)
    made = a / (1 + tl.exp(-a)) * b
    tl.store(out + row * hidden + d, made.to(out.dtype.element_ty), mask=d < hidden)


def swiglu(both: Tensor) -> Tensor:
    """`silu(a) · b` of `(…, 2·hidden)` that holds a, then b."""
    hidden = both.shape[-1] // 2
    out = torch.empty(*both.shape[:-1], hidden, dtype=both.dtype, device=both.device)
    exact = tl.float64 if both.dtype == torch.float64 else tl.float32
    _swiglu[(out.numel() // hidden, triton.cdiv(hidden, BLOCK))](
        both, out, hidden, ACC=exact, SIZE=BLOCK
    )
    return out
