"""Decode attention for a GPU: a kernel per group of heads that writes a token, merges and attends.

What `kernels` is to the CPU. Of torch's operators the same step takes some forty a layer, and their
attention under a mask, which a growing or merged cache needs, reads at a third of memory's speed.
How much is written is read from `Slots.now` on the device, so one CUDA graph serves every length.

Where rows and heads are too few to fill the GPU, programs of their own read segments of a head's
entries first, and the softmaxes are put together (split-KV, as FlashDecoding does).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of eight on an H200: more warps wait for each other's sums. Many short heads read at
# 3.8 TB/s by 16 entries and 3.4 by 32, long ones at 3.6 and 3.9; a plain sum reads at 4.0. With
# more programs than FULL to a multiprocessor, shorter segments are no faster.
ENTRIES, LONG, WARPS, FULL = 16, 1024, 1, 12


def block(r: int, entries: int) -> int:
    """Entries at once, of so many and for `r` query heads to a key-value head: more would not fit
    registers."""
    return max(2 * ENTRIES // int(triton.next_power_of_2(r)), 16) if entries > LONG else ENTRIES


def segments(heads: int, entries: int, device: torch.device) -> int:
    """Programs that share the entries of each of so many heads, rows counted: a power of two."""
    if device.type != "cuda":
        return 1
    wanted = FULL * torch.cuda.get_device_properties(device).multi_processor_count // heads
    share = max(min(wanted, entries // (2 * ENTRIES)), 1)
    return 1 << (share.bit_length() - 1)


@triton.jit
def _merge(
    buffer, mean, d, real, D: tl.constexpr, row, E, to, evicts, band, merged,
    S: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The merge slot `band`, its victim, the entry `to`, taken up; not written yet."""
    first = buffer + row * E * D
    held = mean + (row * S + band) * D if EXACT else first + (E - S + band) * D
    summary = tl.load(held + d, mask=real, other=0.0).to(ACC)
    victim = tl.load(first + to * D + d, mask=real & evicts, other=0.0).to(ACC)
    return tl.where(evicts, summary + (victim - summary) / merged, summary)


@triton.jit
def _write(
    new, summary, buffer, mean, d, real, D: tl.constexpr, row, E, to, evicts, band,
    S: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Put `new` `(D,)` into the entry `to`, and `summary` into its merge slot."""
    first = buffer + row * E * D + d
    tl.store(first + to * D, new.to(buffer.dtype.element_ty), mask=real)
    if S > 0:
        takes = real & evicts
        rounded = summary.to(buffer.dtype.element_ty)
        tl.store(first + (E - S + band) * D, rounded, mask=takes)
        if EXACT:
            tl.store(mean + (row * S + band) * D + d, summary, mask=takes)


@triton.jit
def _add(y, total, top, score, value):
    """One more entry for a softmax `y` `(R2, D2)`, `total` and `top`, both `(R2,)`."""
    highest = tl.maximum(top, score)
    old, share = tl.exp(top - highest), tl.exp(score - highest)
    return y * old[:, None] + share[:, None] * value[None, :], total * old + share, highest


@triton.jit
def _query(q, head, r, d, a, D: tl.constexpr, SCALE: tl.constexpr, q_head, ACC: tl.constexpr):
    """`(R2, D2)`, the scaled queries of a key-value head."""
    asked = (a < r)[:, None] & (d < D)[None, :]
    where = q + (head * r + a)[:, None] * q_head + d[None, :]
    return tl.load(where, mask=asked, other=0.0).to(ACC) * SCALE


@triton.jit
def _load(buffer, e, read, D: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr):
    """The entries `e` of a head that are `read`, `(BLOCK, D2)`."""
    d = tl.arange(0, D2)
    there = read[:, None] & (d < D)[None, :]
    return tl.load(buffer + e[:, None] * D + d[None, :], mask=there, other=0.0).to(ACC)


@triton.jit
def _score(key, query, read, R2: tl.constexpr):
    """`(BLOCK, R2)` of keys `(BLOCK, D2)`, −∞ where not `read`. One query needs no third dimension,
    whose layout would cost 1.4 times the instructions and four times the exchange of lanes."""
    if R2 == 1:
        score = tl.sum(key * query, 1)[:, None]
    else:
        score = tl.sum(key[:, None, :] * query[None, :, :], 2)
    return tl.where(read[:, None], score, float("-inf"))


@triton.jit
def _attend(
    query, keys, values, start, end, to, y, total, top,
    D: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go on with a softmax over the entries `start … end−1` of a head, `to` left out: the sum of
    values `y` `(R2, D2)`, of weights `total` and the highest score `top`, both `(R2,)`."""
    for first in range(start, end, BLOCK):
        e = first + tl.arange(0, BLOCK)
        read = (e < end) & (e != to)
        key, value = _load(keys, e, read, D, D2, ACC), _load(values, e, read, D, D2, ACC)
        score = _score(key, query, read, R2)
        highest = tl.maximum(top, tl.max(score, 0))
        old, share = tl.exp(top - highest), tl.exp(score - highest[None, :])
        if R2 == 1:
            given = tl.sum(share * value, 0)[None, :]
        else:
            given = tl.sum(share[:, :, None] * value[:, None, :], 0)
        y = y * old[:, None] + given
        total, top = total * old + tl.sum(share, 0), highest
    return y, total, top


@triton.jit
def _observe(
    query, keys, kept, start, end, to, total, top, r,
    D: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    PEAK: tl.constexpr,
):  # fmt: skip
    """Add to `kept` what the entries `start … end−1` were given, `to` left out."""
    a = tl.arange(0, R2)
    mean = tl.where(a < r, 1.0 / r, 0.0).to(ACC)  # over the group's query heads
    for first in range(start, end, BLOCK):
        e = first + tl.arange(0, BLOCK)
        read = (e < end) & (e != to)
        score = _score(_load(keys, e, read, D, D2, ACC), query, read, R2)
        share = tl.exp(score - top[None, :]) / total[None, :] * mean[None, :]
        given = tl.sum(share, 1).to(tl.float32)
        before = tl.load(kept + e, mask=read, other=0.0)
        after = tl.maximum(before, given) if PEAK else before + given
        tl.store(kept + e, after, mask=read)


@triton.jit
def _segment(
    q, heads, slot, now, begins, q_row, q_head, slot_row, slot_head, now_row, r,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What this program reads: its row of the buffer, the entries `start … end−1` but `to`, and
    the query that asks them."""
    b, g, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n = tl.load(now + now_row + g)
    long = tl.cdiv(tl.cdiv(n, SEGMENTS), BLOCK) * BLOCK
    query = _query(
        q + b * q_row, tl.load(heads + g), r, tl.arange(0, D2), tl.arange(0, R2),
        D, SCALE, q_head, ACC,
    )  # fmt: skip
    to = tl.load(slot + b * slot_row + g * slot_head)
    start = tl.maximum(s * long, tl.load(begins + b))
    return b * tl.num_programs(1) + g, start, tl.minimum(n, (s + 1) * long), to, query


@triton.jit
def _read_segment(
    q, heads, keys, values, slot, now, begins,
    sums, ends,  # (B, G, parts, r, D), (B, G, parts + 1, r, 2)
    q_row, q_head, slot_row, slot_head, now_row, E, r,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The softmax over a segment of a head's old entries, for `_step` to go on with."""
    row, start, end, to, query = _segment(
        q, heads, slot, now, begins, q_row, q_head, slot_row, slot_head, now_row, r,
        D, SCALE, ACC, D2, R2, BLOCK, SEGMENTS,
    )  # fmt: skip
    s, d, a = tl.program_id(2), tl.arange(0, D2), tl.arange(0, R2)
    y, total, top = _attend(
        query, keys + row * E * D, values + row * E * D, start, end, to,
        tl.zeros((R2, D2), ACC), tl.zeros((R2,), ACC), tl.full((R2,), -1e30, ACC),
        D, D2, R2, ACC, BLOCK,
    )  # fmt: skip
    part = (row * SEGMENTS + s) * r + a
    tl.store(sums + part[:, None] * D + d[None, :], y, mask=(a < r)[:, None] & (d < D)[None, :])
    end_of = ends + ((row * (SEGMENTS + 1) + s) * r + a) * 2
    tl.store(end_of, total, mask=a < r)
    tl.store(end_of + 1, top, mask=a < r)


@triton.jit
def _step(
    q, k, v, out,  # (B, H·r, D), (B, H, D) twice, (B, H·r, D)
    heads, keys, values, mean_k, mean_v,  # (G,), (B, G, E, D) twice, (B, G, S, D) twice
    slot, now, begins, seen,  # (B, G), (3 + S, G), (B,), (B, G, E)
    sums, ends,  # of `_read_segment`
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, slot_row, slot_head, now_row,
    E, r,
    D: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    S: tl.constexpr, EXACT: tl.constexpr, OBSERVE: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    b, g, G = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = b * G + g
    head = tl.load(heads + g)
    to = tl.load(slot + b * slot_row + g * slot_head)
    evicts = tl.load(now + g) > 0
    n, begin = tl.load(now + now_row + g), tl.load(begins + b)
    band = tl.load(now + 2 * now_row + g)

    # What is written comes last: reading does not wait for it, nor for what is merged.
    d, a = tl.arange(0, D2), tl.arange(0, R2)
    real, asked = d < D, (a < r)[:, None] & (d < D)[None, :]
    new_k = tl.load(k + b * k_row + head * k_head + d, mask=real, other=0.0).to(ACC)
    new_v = tl.load(v + b * v_row + head * v_head + d, mask=real, other=0.0).to(ACC)
    sum_k, sum_v = new_k, new_v
    if S > 0:
        merged = tl.load(now + (3 + band) * now_row + g).to(ACC)
        sum_k = _merge(keys, mean_k, d, real, D, row, E, to, evicts, band, merged, S, EXACT, ACC)
        sum_v = _merge(values, mean_v, d, real, D, row, E, to, evicts, band, merged, S, EXACT, ACC)
    query = _query(q + b * q_row, head, r, d, a, D, SCALE, q_head, ACC)

    y, total = tl.zeros((R2, D2), ACC), tl.zeros((R2,), ACC)
    top = tl.full((R2,), -1e30, ACC)
    first = row * E * D
    if SEGMENTS == 1:
        y, total, top = _attend(
            query, keys + first, values + first, begin, n, to, y, total, top, D, D2, R2, ACC, BLOCK
        )
    else:
        for s in range(SEGMENTS):
            part = (row * SEGMENTS + s) * r + a
            theirs = tl.load(sums + part[:, None] * D + d[None, :], mask=asked, other=0.0)
            end_of = ends + ((row * (SEGMENTS + 1) + s) * r + a) * 2
            their_total = tl.load(end_of, mask=a < r, other=0.0)
            their_top = tl.load(end_of + 1, mask=a < r, other=-1e30)
            highest = tl.maximum(top, their_top)
            old, share = tl.exp(top - highest), tl.exp(their_top - highest)
            y = y * old[:, None] + theirs * share[:, None]
            total, top = total * old + their_total * share, highest

    stored = keys.dtype.element_ty
    this_k, this_v = new_k.to(stored).to(ACC), new_v.to(stored).to(ACC)
    own = tl.sum(query * this_k[None, :], 1)  # (R2,)
    y, total, top = _add(y, total, top, own, this_v)
    for s in tl.static_range(S):
        slot_k, slot_v = sum_k.to(stored).to(ACC), sum_v.to(stored).to(ACC)
        if S > 1:
            other = (row * E + E - S + s) * D + d
            other_k = tl.load(keys + other, mask=real, other=0.0).to(ACC)
            other_v = tl.load(values + other, mask=real, other=0.0).to(ACC)
            slot_k = tl.where(s == band, slot_k, other_k)
            slot_v = tl.where(s == band, slot_v, other_v)
        count = tl.load(now + (3 + s) * now_row + g)
        of_slot = tl.sum(query * slot_k[None, :], 1) + tl.log(tl.maximum(count, 1).to(ACC))
        of_slot = tl.where(count > 0, of_slot, float("-inf"))
        y, total, top = _add(y, total, top, of_slot, slot_v)
    _write(new_k, sum_k, keys, mean_k, d, real, D, row, E, to, evicts, band, S, EXACT)
    _write(new_v, sum_v, values, mean_v, d, real, D, row, E, to, evicts, band, S, EXACT)
    answer = (y / total[:, None]).to(out.dtype.element_ty)
    of_query = (head * r + a)[:, None]
    tl.store(out + b * o_row + of_query * o_head + d[None, :], answer, mask=asked)

    if OBSERVE:
        mean = tl.where(a < r, 1.0 / r, 0.0).to(ACC)  # over the group's query heads
        kept = seen + row * E
        tl.store(kept + to, tl.sum(tl.exp(own - top) / total * mean, 0).to(tl.float32))
        if SEGMENTS == 1:
            _observe(
                query, keys + first, kept, begin, n, to, total, top, r, D, D2, R2, ACC, BLOCK, PEAK
            )
        else:
            end_of = ends + ((row * (SEGMENTS + 1) + SEGMENTS) * r + a) * 2
            tl.store(end_of, total, mask=a < r)
            tl.store(end_of + 1, top, mask=a < r)


@triton.jit
def _observe_segment(
    q, heads, keys, slot, now, begins, seen, ends,
    q_row, q_head, slot_row, slot_head, now_row, E, r,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, D2: tl.constexpr, R2: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """What the old entries of a segment were given, when `_step` knows the whole softmax."""
    row, start, end, to, query = _segment(
        q, heads, slot, now, begins, q_row, q_head, slot_row, slot_head, now_row, r,
        D, SCALE, ACC, D2, R2, BLOCK, SEGMENTS,
    )  # fmt: skip
    a = tl.arange(0, R2)
    end_of = ends + ((row * (SEGMENTS + 1) + SEGMENTS) * r + a) * 2
    total = tl.load(end_of, mask=a < r, other=1.0)
    top = tl.load(end_of + 1, mask=a < r, other=0.0)
    _observe(
        query, keys + row * E * D, seen + row * E, start, end, to, total, top, r,
        D, D2, R2, ACC, BLOCK, PEAK,
    )  # fmt: skip


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    merge_slots: int,
    mean_k: Tensor,
    mean_v: Tensor,
    slot: Tensor,
    now: Tensor,
    first: Tensor,
    seen: Tensor | None,
    peak: bool,
) -> None:
    """A step of a group of heads, of one layer; arguments as those of `kernels.decode_step`, on the
    device, in float32, or float64 where storage is. The rows of q, k, v and out are contiguous."""
    B, G, E, D = keys.shape
    r = q.shape[1] // k.shape[1]
    assert all(x.stride(-1) == 1 for x in (q, k, v, out, now, heads)), "rows must be contiguous"
    parts = segments(B * G, E, keys.device)
    exact = torch.promote_types(keys.dtype, torch.float32)
    sums = torch.empty((B, G, parts, r, D) if parts > 1 else 0, dtype=exact, device=keys.device)
    ends = torch.empty((B, G, parts + 1, r, 2) if parts > 1 else 0, dtype=exact, device=keys.device)
    place = (*slot.stride(), now.stride(0), E, r)
    constants = {
        "D": D, "SCALE": D**-0.5, "ACC": tl.float64 if exact == torch.float64 else tl.float32,
        "D2": triton.next_power_of_2(D), "R2": triton.next_power_of_2(r), "BLOCK": block(r, E),
        "SEGMENTS": parts, "num_warps": WARPS,
    }  # fmt: skip
    if parts > 1:
        _read_segment[(B, G, parts)](
            q,
            heads,
            keys,
            values,
            slot,
            now,
            first,
            sums,
            ends,
            *q.stride()[:2],
            *place,
            **constants,
        )
    _step[(B, G)](
        q, k, v, out, heads, keys, values, mean_k, mean_v, slot, now, first,
        mean_k if seen is None else seen, sums, ends,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], *place, **constants,
        S=merge_slots, EXACT=mean_k.dtype != keys.dtype, OBSERVE=seen is not None, PEAK=peak,
    )  # fmt: skip
    if parts > 1 and seen is not None:
        _observe_segment[(B, G, parts)](
            q,
            heads,
            keys,
            slot,
            now,
            first,
            seen,
            ends,
            *q.stride()[:2],
            *place,
            **constants,
            PEAK=peak,
        )
