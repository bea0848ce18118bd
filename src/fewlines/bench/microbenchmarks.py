"""Kernel microbenchmarks, side by side: how attention reads a cache, how a linear layer runs.

The shape is one layer of LlamaGen-B; buffers take turns, so that none is warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines import machine
from fewlines.bench.roofline import make_plain, make_reader
from fewlines.models.llamagen.cost import count_linear_flops, list_linears
from fewlines.models.llamagen.engine import PackedLinear
from fewlines.models.llamagen.shape import SHAPES
from fewlines.progress import progress

SHAPE = SHAPES["llamagen-b"].on((64, 64))
SPREAD = 2**29  # bytes over which buffers or weights take turns
STORAGES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = ((1, 4096), (32, 257), (32, 2048))  # rows, entries
ROWS = (1, 2, 8, 32, 128)  # of a linear layer


def measure_candidates() -> list[dict[str, Any]]:
    """Time each candidate: one dict per candidate and size: `what`, `how`, `dtype`, `rows`,
    `entries`, and the best `rate` in bytes/s (attention) or FLOP/s (linear)."""
    jobs = [*_attention(), *_linears()]
    bar = progress("kernels", len(jobs), "candidates")
    found = []
    for description, work, run in jobs:
        made = run()
        seconds = machine.best_seconds(made, repeats=3)
        found.append({**description, "rate": work / seconds, "seconds": seconds})
        bar.update()
    bar.close()
    return found


Job = tuple[dict[str, Any], float, Callable[[], Callable[[], Any]]]


def _attention() -> Iterator[Job]:
    for (rows, entries), dtype in itertools.product(ATTENTION, STORAGES):
        size = 2 * rows * SHAPE.kv_heads * entries * SHAPE.head_dim * dtype.itemsize
        for how, make in (("sdpa", _sdpa), ("matmul", _matmul), ("compiled", _compiled)):
            description = {
                "what": "attention",
                "how": how,
                "dtype": machine.dtype_name(dtype),
                "rows": rows,
                "entries": entries,
            }
            copies = max(2, SPREAD // size)
            yield description, size * copies, partial(make, rows, entries, dtype, copies)


def _buffers(rows: int, entries: int, dtype: torch.dtype, copies: int) -> list[Tensor]:
    row = torch.randn(SHAPE.head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    shape = (2, rows, SHAPE.kv_heads, entries, SHAPE.head_dim)
    return [row.expand(shape).contiguous() for _ in range(copies)]


def _sdpa(*size: Any) -> Callable[[], None]:
    buffers = _buffers(*size)
    q = torch.ones(size[0], SHAPE.heads, 1, SHAPE.head_dim, dtype=size[2])

    def run() -> None:
        for k, v in buffers:
            F.scaled_dot_product_attention(q, k, v)

    return run


def _matmul(*size: Any) -> Callable[[], None]:
    buffers = _buffers(*size)
    q = torch.ones(size[0], SHAPE.heads, 1, SHAPE.head_dim, dtype=size[2])

    def run() -> None:
        for k, v in buffers:
            (q @ k.transpose(2, 3)).softmax(-1) @ v

    return run


def _compiled(rows: int, entries: int, dtype: torch.dtype, copies: int) -> Callable[[], None]:
    steps = [make_reader(*pair) for pair in _buffers(rows, entries, dtype, copies)]

    def run() -> None:
        for step in steps:
            step()

    return run


def _linears() -> Iterator[Job]:
    for rows in ROWS:
        flops = count_linear_flops(SHAPE, rows)
        for how, dtype in (
            ("line_ar", torch.float32),
            ("line_ar", torch.bfloat16),
            ("packed", torch.float32),
            ("packed", torch.bfloat16),
            ("int8 weights", torch.bfloat16),
        ):
            if dtype == torch.bfloat16 and not machine.has_bf16():
                continue  # hundreds of times slower
            description = {
                "what": "linear",
                "how": how,
                "dtype": machine.dtype_name(dtype),
                "rows": rows,
            }
            yield description, flops, partial(_layers, how, dtype, rows)


def _layers(how: str, dtype: torch.dtype, rows: int) -> Callable[[], None]:
    """All linear layers of a step."""
    layers: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for out, into in list_linears(SHAPE):
        weight = torch.randn(into).expand(out, into).to(dtype).contiguous()
        if how == "packed":
            run: Callable[[Tensor], Tensor] = PackedLinear(weight, dtype, max(rows, 2))
        elif how == "linear":
            run = make_plain(weight)
        else:
            run = _int8(weight)
        layers.append((run, torch.ones(rows, into, dtype=dtype)))

    @torch.inference_mode()
    def step() -> None:
        for run, x in layers:
            run(x)

    return step


def _int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """By torch's weight-only int8: a scale for each output."""
    scale = weight.abs().amax(1).float() / 127
    packed = (weight.float() / scale[:, None]).round().to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x, packed, scale.to(x.dtype))
