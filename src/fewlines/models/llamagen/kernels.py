"""What lies between the products of a decode step, compiled: one pass each instead of a dozen
operators, whose starting costs more than their work at a few rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fewlines.attention.kernels import negative_exp

F32 = np.float32
# Compiled at the first call, not on import: compiling starts threads, and then nobody may fork.
COMPILE = {"parallel": True, "fastmath": True, "nogil": True, "cache": True}


@numba.njit(**COMPILE)
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """`x · weight / rms(x)` of rows `(R, dim)`."""
    R, dim = x.shape
    for row in numba.prange(R):
        total = F32(0)
        for d in range(dim):
            total += x[row, d] * x[row, d]
        scale = F32(1) / np.sqrt(total / F32(dim) + F32(eps))
        for d in range(dim):
            out[row, d] = x[row, d] * scale * weight[d]


@numba.njit(**COMPILE)
def swiglu(both: Any, out: Any) -> None:
    """`silu(a) · b` of rows `(R, 2·hidden)` that hold a, then b."""
    R, hidden = out.shape
    for row in numba.prange(R):
        for d in range(hidden):
            a = both[row, d]
            e = negative_exp(-abs(a))
            gate = (F32(1) if a >= 0 else e) / (F32(1) + e)
            out[row, d] = a * gate * both[row, hidden + d]


@numba.njit(**COMPILE)
def rotate(qkv: Any, heads: Any, rotation: Any) -> None:
    """Turn the first `heads` heads of rows `(B·T, heads, D)` in place, pair by pair, by their
    position's `(T, D/2, 2)`."""
    R, _, D = qkv.shape
    T = rotation.shape[0]
    for row in numba.prange(R):
        t = row % T
        for head in range(heads):
            for pair in range(D // 2):
                cos, sin = rotation[t, pair, 0], rotation[t, pair, 1]
                a, b = qkv[row, head, 2 * pair], qkv[row, head, 2 * pair + 1]
                qkv[row, head, 2 * pair] = a * cos - b * sin
                qkv[row, head, 2 * pair + 1] = a * sin + b * cos
