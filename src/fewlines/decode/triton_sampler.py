"""Plain sampling on a GPU, in one kernel: of torch's operators it takes five, and their sums in
float64 write twice what the logits are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8  # logits at once


@triton.jit
def _draw(logits, noise, codes, V, temperature, SIZE: tl.constexpr):
    """Invert the cumulative distribution of one row; `V` where it is not finite."""
    row = tl.program_id(0).to(tl.int64)
    first, inside = logits + row * V, tl.arange(0, SIZE)
    highest = tl.full((SIZE,), float("-inf"), tl.float32)
    for start in range(0, V, SIZE):
        there = start + inside < V
        block = tl.load(first + start + inside, mask=there, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, block)
    top = tl.max(highest, 0)
    total = tl.full((), 0, tl.float64)
    for start in range(0, V, SIZE):
        there = start + inside < V
        block = tl.load(first + start + inside, mask=there, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp((block - top) / temperature).to(tl.float64), 0)
    target = tl.load(noise + row) * total
    below = tl.full((), 0, tl.float64)
    code = tl.full((), 0, tl.int64)
    for start in range(0, V, SIZE):
        there = start + inside < V
        block = tl.load(first + start + inside, mask=there, other=float("-inf")).to(tl.float32)
        masses = tl.exp((block - top) / temperature).to(tl.float64)
        until = below + tl.sum(masses, 0)
        if (below <= target) & (target < until):
            passed = (below + tl.cumsum(masses, 0) <= target) & there
            code = start + tl.sum(passed.to(tl.int64), 0)
        below = until
    code = tl.where(total == total, tl.minimum(code, V - 1), V)
    tl.store(codes + row, code)


def draw(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Draw as `Sampler` does, from logits `(B, V)` and noise `(B,)`; codes `(B,)`."""
    logits = logits.contiguous()
    codes = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    finite = min(temperature, 1e30)  # in 32 bits
    with torch.cuda.device_of(logits):
        _draw[(len(logits),)](
            logits, noise.contiguous(), codes, logits.shape[1], finite, SIZE=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return codes
