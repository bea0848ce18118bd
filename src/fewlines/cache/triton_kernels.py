"""Decode attention for a GPU: one kernel per group of heads that writes a token, folds and attends.

What `kernels` is to the CPU. Of torch's operators the same step takes some forty a layer, and their
attention under a mask, which a growing or folded cache needs, reads at a third of memory's speed.
How much is written is read from `Slots.now` on the device, so one CUDA graph serves every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of eight on an H200, for few rows and many: more warps wait for each other's sums.
ENTRIES, WARPS = 32, 1


def block(r: int) -> int:
    """Entries at once, for `r` query heads to a key-value head: more would not fit registers."""
    return max(ENTRIES // int(triton.next_power_of_2(r)), 16)


@triton.jit
def _write(
    new, buffer, mean, d, real, D: tl.constexpr, row, E, to, evicts, folded,
    FOLD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Put `new` `(D,)` into the entry `to` and its victim into the summary; returns both as stored,
    in the precision of the arithmetic."""
    first = buffer + row * E * D
    summary = new
    if FOLD:
        last = first + (E - 1) * D + d
        held = mean + row * D + d if EXACT else last
        summary = tl.load(held, mask=real, other=0.0).to(new.dtype)
        if evicts:
            victim = tl.load(first + to * D + d, mask=real, other=0.0).to(new.dtype)
            summary += (victim - summary) / folded
            tl.store(held, summary, mask=real)
            tl.store(last, summary.to(buffer.dtype.element_ty), mask=real)
        summary = summary.to(buffer.dtype.element_ty).to(new.dtype)
    stored = new.to(buffer.dtype.element_ty)
    tl.store(first + to * D + d, stored, mask=real)
    return stored.to(new.dtype), summary


@triton.jit
def _step(
    q, k, v, out,  # (B, H·r, D), (B, H, D) twice, (B, H·r, D)
    heads, keys, values, mean_k, mean_v,  # (G,), (B, G, E, D) twice, (B, G, D) twice
    slot, now, seen,  # (B, G), (3, G), (B, G, E)
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, slot_row, slot_head, now_row,
    E, r,
    D: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr, EXACT: tl.constexpr, OBSERVE: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    b, g, G = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = b * G + g
    head = tl.load(heads + g)
    to = tl.load(slot + b * slot_row + g * slot_head)
    evicts = tl.load(now + g) > 0
    folded = tl.load(now + now_row + g)
    n = tl.load(now + 2 * now_row + g)

    d, a = tl.arange(0, D2), tl.arange(0, R2)
    real, asked = d < D, (a < r)[:, None] & (d < D)[None, :]
    new_k = tl.load(k + b * k_row + head * k_head + d, mask=real, other=0.0).to(ACC)
    new_v = tl.load(v + b * v_row + head * v_head + d, mask=real, other=0.0).to(ACC)
    new_k, sum_k = _write(
        new_k, keys, mean_k, d, real, D, row, E, to, evicts, folded.to(ACC), FOLD, EXACT
    )
    new_v, sum_v = _write(
        new_v, values, mean_v, d, real, D, row, E, to, evicts, folded.to(ACC), FOLD, EXACT
    )

    of_query = (head * r + a)[:, None]
    query = tl.load(q + b * q_row + of_query * q_head + d[None, :], mask=asked, other=0.0)
    query = query.to(ACC) * SCALE  # (R2, D2)

    # The new token and the summary are at hand: what was just written is never read back.
    top = tl.sum(query * new_k[None, :], 1)  # (R2,)
    own = top
    total = tl.full((R2,), 1, ACC)
    y = tl.zeros((R2, D2), ACC) + new_v[None, :]
    if FOLD:
        of_sum = tl.sum(query * sum_k[None, :], 1) + tl.log(tl.maximum(folded, 1).to(ACC))
        of_sum = tl.where(folded > 0, of_sum, float("-inf"))
        highest = tl.maximum(top, of_sum)
        y = y * tl.exp(top - highest)[:, None] + tl.exp(of_sum - highest)[:, None] * sum_v[None, :]
        total, top = tl.exp(top - highest) + tl.exp(of_sum - highest), highest

    first = row * E * D
    for start in range(0, n, BLOCK):
        e = start + tl.arange(0, BLOCK)
        read = (e < n) & (e != to)
        where = first + e[:, None] * D + d[None, :]
        there = read[:, None] & real[None, :]
        key = tl.load(keys + where, mask=there, other=0.0).to(ACC)  # (BLOCK, D2)
        value = tl.load(values + where, mask=there, other=0.0).to(ACC)
        score = tl.sum(key[:, None, :] * query[None, :, :], 2)  # (BLOCK, R2)
        score = tl.where(read[:, None], score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 0))
        old, share = tl.exp(top - highest), tl.exp(score - highest[None, :])
        y = y * old[:, None] + tl.sum(share[:, :, None] * value[:, None, :], 0)
        total, top = total * old + tl.sum(share, 0), highest
    answer = (y / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + b * o_row + of_query * o_head + d[None, :], answer, mask=asked)

    if OBSERVE:
        mean = tl.where(a < r, 1.0 / r, 0.0).to(ACC)  # over the group's query heads
        kept = seen + row * E
        tl.store(kept + to, tl.sum(tl.exp(own - top) / total * mean, 0).to(tl.float32))
        for start in range(0, n, BLOCK):
            e = start + tl.arange(0, BLOCK)
            read = (e < n) & (e != to)
            there = read[:, None] & real[None, :]
            where = first + e[:, None] * D + d[None, :]
            key = tl.load(keys + where, mask=there, other=0.0).to(ACC)
            score = tl.sum(key[:, None, :] * query[None, :, :], 2)
            share = tl.exp(score - top[None, :]) / total[None, :] * mean[None, :]
            given = tl.sum(share, 1).to(tl.float32)
            before = tl.load(kept + e, mask=read, other=0.0)
            after = tl.maximum(before, given) if PEAK else before + given
            tl.store(kept + e, after, mask=read)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    fold: bool,
    mean_k: Tensor,
    mean_v: Tensor,
    slot: Tensor,
    now: Tensor,
    seen: Tensor | None,
    peak: bool,
) -> None:
    """A step of a group of heads, of one layer; arguments as those of `kernels.decode_step`, on the
    device, in float32, or float64 where storage is. The rows of q, k, v and out are contiguous."""
    B, G, E, D = keys.shape
    r = q.shape[1] // k.shape[1]
    exact = mean_k.dtype != keys.dtype
    assert all(x.stride(-1) == 1 for x in (q, k, v, out, now, heads)), "rows must be contiguous"
    _step[(B, G)](
        q, k, v, out, heads, keys, values, mean_k, mean_v, slot, now,
        mean_k if seen is None else seen,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
        *slot.stride(), now.stride(0), E, r, D=D, SCALE=D**-0.5,
        ACC=tl.float64 if keys.dtype == torch.float64 else tl.float32,
        D2=triton.next_power_of_2(D), R2=triton.next_power_of_2(r), BLOCK=block(r),
        FOLD=fold, EXACT=exact, OBSERVE=seen is not None, PEAK=peak, num_warps=WARPS,
    )  # fmt: skip
