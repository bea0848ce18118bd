"""What this machine can do at best: the read bandwidth and the rate of the linear layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines import machine
from fewlines.attention.kernels import as_array, decode_step
from fewlines.attention.slots import LENGTH
from fewlines.decode.graphs import capture
from fewlines.models.llamagen.engine import PackedLinear

Layers = list[tuple[int, int]]
PROBE_BYTES = 2**30  # far beyond any cache


def measure_bandwidth() -> float:
    """Measure the best rate of reading memory once, bytes/s: a sum, and the attention kernels."""
    floats = torch.ones(PROBE_BYTES // 4, device=machine.device())
    rates = [floats.nbytes / machine.best_seconds(floats.sum, repeats=20)]
    if machine.device().type == "cpu":
        del floats
        rates += [_kernel_bandwidth(dtype) for dtype in (torch.float32, torch.float16)]
    return max(rates)


def _kernel_bandwidth(storage: torch.dtype, rows: int = 32, head_dim: int = 64) -> float:
    entries = PROBE_BYTES // (2 * rows * head_dim * storage.itemsize)
    keys, values = torch.ones(2, rows, 1, entries, head_dim, dtype=storage)
    seconds = machine.best_seconds(make_reader(keys, values), repeats=3)
    return float(2 * keys.nbytes / seconds)


def make_reader(keys: Tensor, values: Tensor) -> Callable[[], None]:
    """Make a step of the compiled attention that reads the whole of buffers `(B, G, E, D)`, a query
    a head."""
    rows, groups, entries, head_dim = keys.shape
    new = np.ones((rows, groups, head_dim), np.float32)
    out, nothing = new.copy(), np.zeros((0, 1, 1), np.float32)
    no_means = np.zeros((0, 1, 1, 1), np.float32)
    slot, heads = np.zeros((rows, groups), np.int64), np.arange(groups)
    now = np.zeros((3, groups), np.int64)
    now[LENGTH] = entries
    step = decode_step(head_dim, keys.dtype)
    first = np.zeros(rows, np.int64)
    held = (heads, as_array(keys), as_array(values), 0, no_means, no_means, slot, now, first)
    return lambda: step(new, new, new, *held, out, nothing, False)


def measure_linears(layers: Layers, rows: int) -> dict[str, dict[str, float]]:
    """Measure the FLOP/s of linear layers `(out, in)`, by precision and path. Layers that are alike
    take turns on as many different weights as a step reads, or as fit into a probe."""
    precisions = [torch.float32]
    if machine.device().type == "cuda" or machine.has_bf16():
        precisions.append(torch.bfloat16)
    return {
        machine.dtype_name(dtype): {
            "linear": _linear_rate(layers, rows, dtype, packed=False),
            "packed": _linear_rate(layers, rows, dtype, packed=True),
        }
        for dtype in precisions
    }


def _linear_rate(shapes: Layers, rows: int, dtype: torch.dtype, packed: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    device = machine.device()
    layers: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    held = flops = 0
    for out, into in shapes:
        row = torch.randn(into, generator=generator)
        weight = row.expand(out, into).to(device, dtype, copy=True).contiguous()
        x = torch.randn(rows, into, generator=generator).to(device, dtype)
        if packed:
            layers.append((PackedLinear(weight, dtype, max(rows, 2)), x))
        else:
            layers.append((partial(F.linear, weight=weight), x))
        held, flops = held + weight.nbytes, flops + 2 * rows * out * into
        if held > PROBE_BYTES:
            break
    with torch.inference_mode():
        run = _replayed(lambda: [layer(x) for layer, x in layers])
        seconds = machine.best_seconds(run, repeats=15)
    return flops / seconds


def measure_operator(rows: int, width: int) -> float:
    """Measure the seconds of one small operator on `(rows, width)`, mostly that of starting it."""
    a, b = torch.ones(2, rows, width, device=machine.device())
    count = 200
    return machine.best_seconds(_replayed(lambda: [a + b for _ in range(count)])) / count


def _replayed(operation: Callable[[], Any]) -> Callable[[], Any]:
    """On a GPU a CUDA graph of an operation, as the engine replays its steps: one by one, small
    kernels take as long as the host needs to start them."""
    if machine.device().type != "cuda":
        return operation
    operation()
    return capture(operation)[0].replay


def probe_layers(layers: Layers, rows: int, width: int) -> dict[str, Any]:
    """Measure what batches of so many rows get: of linear layers `(out, in)`, of reading, and of
    small operators of a width."""
    return {
        "bandwidth": measure_bandwidth(),
        "linear_rates": measure_linears(layers, rows),
        "operator_seconds": measure_operator(rows, width),
    }


def probe_machine(decode: Any) -> dict[str, Any]:
    """Measure all of it, for the cost model of a decode."""
    probe = probe_layers(decode.linears, decode.rows, decode.shape.dim)
    return {**probe, "linear_flops": decode.linear_flops}


def keep_best(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Keep the better figure of two probes of the same decode, each by itself: on a noisy machine
    one probe is no bound."""
    linears = {
        dtype: {path: max(rate, other["linear_rates"][dtype][path]) for path, rate in rates.items()}
        for dtype, rates in one["linear_rates"].items()
    }
    return {
        "bandwidth": max(one["bandwidth"], other["bandwidth"]),
        "linear_rates": linears,
        "linear_flops": one["linear_flops"],
        "operator_seconds": min(one["operator_seconds"], other["operator_seconds"]),
    }
