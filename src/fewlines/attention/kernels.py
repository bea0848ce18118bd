"""Decode attention for the CPU: one compiled pass that writes a token, merges and attends.

torch's own attention reads 16-bit keys and values slower than memory delivers them, on some
processors ten times slower. This loop widens them to float32 in registers, asks for the lines it
will need next, and runs at the memory's speed. numba compiles
it on the user's machine, for the user's processor, and keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD = 32  # entries that are fetched before they are needed: 16 and fewer were slower
UNROLL = 4  # entries in flight, so that sums do not wait for each other
CACHE_LINE = 64  # bytes

F32 = np.float32
EMPTY = F32(-1e30)  # the score of an empty merge slot
I32, FLOAT = ir.IntType(32), ir.FloatType()


# What a stored number is to numba: bfloat16 and float16 as the integers of equal bits.
STORED = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.uint16}


@intrinsic
def _widen(context: Any, x: Any) -> Any:
    """A stored number as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if x == types.float32:
            return arguments[0]
        if x == types.uint16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), FLOAT)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), I32(16)), FLOAT)

    return types.float32(x), generate


@intrinsic
def _store(context: Any, array: Any, index: Any, x: Any) -> Any:
    """Write a float32 into `array[index]` as it is stored, rounded to the nearest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type, _ = signature.args
        made = context.make_array(array_type)(context, builder, arguments[0])
        indices = cgutils.unpack_tuple(builder, arguments[1], count=len(index_type))
        address = cgutils.get_item_pointer(
            context, builder, array_type, made, indices, wraparound=False
        )
        number = arguments[2]
        if array_type.dtype == types.uint16:
            number = builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))
        elif array_type.dtype == types.int16:  # ties to even
            bits = builder.bitcast(number, I32)
            odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
            bits = builder.add(bits, builder.add(odd, I32(0x7FFF)))
            number = builder.trunc(builder.lshr(bits, I32(16)), ir.IntType(16))
        builder.store(number, address)
        return context.get_dummy_value()

    return types.void(array, types.UniTuple(types.intp, len(index)), types.float32), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(arguments[0], I32(127)), I32(23)), FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _prefetch(context: Any, array: Any, e: Any, d: Any) -> Any:
    """Ask for `array[e, d]`; out of bounds is no error."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, *index_types = signature.args
        made = context.make_array(array_type)(context, builder, arguments[0])
        index = [
            context.cast(builder, value, given, types.intp)
            for value, given in zip(arguments[1:], index_types, strict=True)
        ]
        address = cgutils.get_item_pointer(
            context, builder, array_type, made, index, wraparound=False
        )
        byte = ir.IntType(8).as_pointer()
        prefetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]),
            "llvm.prefetch.p0",
        )
        builder.call(prefetch, [builder.bitcast(address, byte), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(array, e, d), generate


@numba.njit(inline="always", fastmath=True)
def negative_exp(x: Any) -> Any:
    """Compute e to a power of at most 0, to 2e-7: by a polynomial, so that the loop vectorises."""
    y = max(x * F32(math.log2(math.e)), F32(-126))
    whole = np.int32(y - F32(0.5))
    part = y - F32(whole)
    p = F32(1.54035304e-4)
    p = p * part + F32(1.33335581e-3)
    p = p * part + F32(9.61812911e-3)
    p = p * part + F32(5.55041087e-2)
    p = p * part + F32(2.40226507e-1)
    p = p * part + F32(6.93147181e-1)
    p = p * part + F32(1)
    return p * _power_of_two(whole)


def follow_torch_threads() -> None:
    """Use as many threads as torch does: a process that was given one core keeps to it."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as numpy; 16-bit floats as the integers of equal bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    elif tensor.dtype == torch.float16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


@lru_cache
def decode_step(head_dim: int, storage: torch.dtype) -> Callable[..., None]:
    """The compiled step of a group of heads, of one layer:

        step(q, k, v, heads, keys, values, S, mean_k, mean_v, slot, now, first, out, seen, peak)

    Args of that function, `r` query heads to a key-value head, `E` entries to a head, float32
    and int64 where nothing else is said:
        q: `(B, H·r, D)`, k, v: `(B, H, D)` of the new token, for all heads of the layer.
        heads: `(G,)`, the heads of this group.
        keys, values: `(B, G, E, D)` stored, the last `S` entries the merge slots of those merged.
        S: how many; 0 where victims are dropped.
        mean_k, mean_v: `(B, G, S, D)`, the merge slots unrounded; empty where the entry itself is
            exact.
        slot: `(B, G)`, the entry that the new token takes.
        now: `(3 + S, G)`, see `Slots`: whether a token is evicted; entries written, from the first
            on, merge slots not counted; the victim's merge slot; victims in each so far.
        first: `(B,)`, entries before it are padding of a prompt that is shorter than others.
        out: `(B, H·r, D)`, written.
        seen: `(B, G, E)`, attention given to each entry, mean over the group's query heads, is
            added to it, or its maximum kept where `peak`; empty where nobody asks. The entry that
            is overwritten starts from 0.
    """
    D, stride = head_dim, CACHE_LINE // storage.itemsize  # numba caches closures over numbers only
    stored = types.Array(numba.from_dtype(np.dtype(STORED[storage])), 4, "C")
    row, whole = types.Array(types.float32, 3, "A"), types.Array(types.float32, 3, "C")
    heads, rows = types.Array(types.int64, 1, "C"), types.Array(types.int64, 2, "A")
    flag, mean = types.boolean, types.Array(types.float32, 4, "C")
    new = (row, row, row)
    buffers = (heads, stored, stored, types.int64, mean, mean)
    signature = types.void(*new, *buffers, rows, rows, heads, whole, whole, flag)

    def step(q, k, v, heads, keys, values, S, mean_k, mean_v, slot, now, first, out, seen, peak):
        B, G, E, _ = keys.shape
        r = q.shape[1] // k.shape[1]
        exact = mean_k.shape[0] > 0
        observed = seen.shape[0] > 0
        scale = F32(D**-0.5)
        for i in numba.prange(B * G):
            b, g = i // G, i % G
            head = heads[g]
            new = slot[b, g]

            if S > 0 and now[0, g]:
                band = now[2, g]
                own = E - S + band
                share = F32(1) / F32(now[3 + band, g])
                # By way of arrays of its own: then every loop is one of vectors.
                mean, victim = np.empty((2, D), np.float32), np.empty((2, D), np.float32)
                for d in range(D):
                    victim[0, d] = _widen(keys[b, g, new, d])
                for d in range(D):
                    victim[1, d] = _widen(values[b, g, new, d])
                if exact:
                    for d in range(D):
                        mean[0, d] = mean_k[b, g, band, d]
                    for d in range(D):
                        mean[1, d] = mean_v[b, g, band, d]
                else:
                    for d in range(D):
                        mean[0, d] = _widen(keys[b, g, own, d])
                    for d in range(D):
                        mean[1, d] = _widen(values[b, g, own, d])
                for d in range(D):
                    mean[0, d] += (victim[0, d] - mean[0, d]) * share
                    mean[1, d] += (victim[1, d] - mean[1, d]) * share
                if exact:
                    for d in range(D):
                        mean_k[b, g, band, d] = mean[0, d]
                    for d in range(D):
                        mean_v[b, g, band, d] = mean[1, d]
                for d in range(D):
                    _store(keys, (b, g, own, d), mean[0, d])
                for d in range(D):
                    _store(values, (b, g, own, d), mean[1, d])
            for d in range(D):
                _store(keys, (b, g, new, d), k[b, head, d])
                _store(values, (b, g, new, d), v[b, head, d])

            key, value = keys[b, g], values[b, g]
            n = now[1, g]
            whole = n - n % UNROLL
            anybody = 0
            for s in range(S):
                anybody += now[3 + s, g]
            last = n + S if anybody > 0 else n
            query = np.empty((r, D), np.float32)
            for a in range(r):
                for d in range(D):
                    query[a, d] = q[b, head * r + a, d] * scale
            weight = np.empty((r, n + S), np.float32)

            for e in range(0, whole, UNROLL):
                for ahead in range(e + AHEAD, e + AHEAD + UNROLL):
                    for d in range(0, D, stride):
                        _prefetch(key, ahead, d)
                for a in range(r):
                    s0, s1, s2, s3 = F32(0), F32(0), F32(0), F32(0)
                    for d in range(D):
                        x = query[a, d]
                        s0 += x * _widen(key[e, d])
                        s1 += x * _widen(key[e + 1, d])
                        s2 += x * _widen(key[e + 2, d])
                        s3 += x * _widen(key[e + 3, d])
                    weight[a, e], weight[a, e + 1] = s0, s1
                    weight[a, e + 2], weight[a, e + 3] = s2, s3
            for e in range(whole, last):
                entry = e if e < n else E - S + e - n
                for a in range(r):
                    s0 = F32(0)
                    for d in range(D):
                        s0 += query[a, d] * _widen(key[entry, d])
                    weight[a, e] = s0
            for e in range(n, last):
                merged = now[3 + e - n, g]
                for a in range(r):
                    weight[a, e] = weight[a, e] + F32(math.log(merged)) if merged > 0 else EMPTY

            for e in range(first[b]):
                for a in range(r):
                    weight[a, e] = EMPTY

            for a in range(r):
                top = weight[a, 0]
                for e in range(1, last):
                    top = max(top, weight[a, e])
                total = F32(0)
                for e in range(last):
                    weight[a, e] = negative_exp(weight[a, e] - top)
                    total += weight[a, e]
                share = F32(1) / total
                for e in range(last):
                    weight[a, e] *= share
            if observed:
                seen[b, g, new] = F32(0)
                for e in range(n):
                    s0 = F32(0)
                    for a in range(r):
                        s0 += weight[a, e]
                    s0 /= F32(r)
                    seen[b, g, e] = max(seen[b, g, e], s0) if peak else seen[b, g, e] + s0

            y = np.zeros((r, D), np.float32)
            for e in range(0, whole, UNROLL):
                for ahead in range(e + AHEAD, e + AHEAD + UNROLL):
                    for d in range(0, D, stride):
                        _prefetch(value, ahead, d)
                for a in range(r):
                    w0, w1 = weight[a, e], weight[a, e + 1]
                    w2, w3 = weight[a, e + 2], weight[a, e + 3]
                    for d in range(D):
                        y[a, d] += (
                            w0 * _widen(value[e, d])
                            + w1 * _widen(value[e + 1, d])
                            + w2 * _widen(value[e + 2, d])
                            + w3 * _widen(value[e + 3, d])
                        )
            for e in range(whole, last):
                entry = e if e < n else E - S + e - n
                for a in range(r):
                    w0 = weight[a, e]
                    for d in range(D):
                        y[a, d] += w0 * _widen(value[entry, d])
            for a in range(r):
                for d in range(D):
                    out[b, head * r + a, d] = y[a, d]

    # So that each has its own index on disk: numba writes that without a lock, and of two processes
    # that compile for different heads at once, one would later be given the other's code.
    step.__qualname__ = f"decode_step.{np.dtype(STORED[storage])}.{D}"
    how = {"parallel": True, "fastmath": True, "nogil": True, "cache": True}
    compiled: Callable[..., None] = numba.njit(signature, **how)(step)
    return compiled
