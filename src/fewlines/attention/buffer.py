"""The bounded key-value buffer of a batch. It is the attention of the decode loop.

Keys are stored after RoPE, so where an entry lies does not matter: a new token overwrites its
victim's slot. Nothing is moved, nothing grows, and no attention call ever sees more than the
prefix and the capacity, the token being decoded included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines import machine
from fewlines.attention.kernels import STORED, as_array, decode_step, follow_torch_threads
from fewlines.attention.slots import (
    BAND,
    EVICTS,
    LENGTH,
    MERGED,
    RankedSlots,
    Slots,
    Tables,
    TableSlots,
)
from fewlines.cache.plan import EvictionPlan

Engine = Literal["lean", "stock", "stock-graph"]
BLOCK = 64  # entries by which torch's attention grows: a CUDA graph for each size is too many


class HeadGroup:
    """The heads of a layer that have equal capacity and as many merge slots, in one buffer.

    Entries: the prefix `0 … P−1`, then the tokens, then the `S` merge slots if victims are merged.
    """

    def __init__(
        self,
        plan: EvictionPlan,
        layer: int,
        heads: list[int],
        batch: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        first: Tensor,
    ) -> None:
        self.first, self.padded = first, False  # (B,), of all groups, and whether any is not 0
        self.heads = torch.tensor(heads, device=device)
        self.layer_heads = plan.geometry.heads
        self.prefix = plan.geometry.prefix
        self.merge_slots = int(plan.merge_slots[layer, heads[0]])
        entries = self.prefix + int(plan.entries[layer, heads[0]])
        shape = (batch, len(heads), entries, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slots: Slots = (
            TableSlots(plan, layer, heads, batch)
            if plan.scoring is None
            else RankedSlots(plan, plan.scoring, layer, batch, heads, entries, device)
        )
        # A running mean does not survive 16 bits: there the merge slot's entry is its rounded copy.
        exact, tokens = torch.promote_types(dtype, torch.float32), entries - self.merge_slots
        self.mean_k, self.mean_v = (x[:, :, tokens:].to(exact) for x in (self.k, self.v))

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, the exact copies of 16-bit merge slots included."""
        copies = (self.mean_k, self.mean_v) if self.mean_k.dtype != self.k.dtype else ()
        return sum(held.nbytes for held in (self.k, self.v, *copies))

    def reads(self) -> int:
        """Entries that `torch_step` reads at this step."""
        slots, entries = self.slots, self.k.shape[2]
        if self.merge_slots and slots.evicted:
            return entries
        return min(entries, -(-slots.longest // BLOCK) * BLOCK)

    def signature(self, sized: bool) -> tuple[object, ...]:
        """What of a step the host decides: steps of equal signature are the same operations on the
        same memory, of sizes that change with the step where `sized`."""
        slots = self.slots
        seen = 0 if slots.seen is None else slots.seen.data_ptr()
        if not sized:
            return (seen,)
        reads = self.reads()
        merges = self.merge_slots and (slots.evicting, slots.evicted)
        return reads, slots.shortest < reads, merges, seen

    def write_prefix(self, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `(B, H, P, D)` of the prefix."""
        self.k[:, :, : self.prefix] = k[:, self.heads]
        self.v[:, :, : self.prefix] = v[:, self.heads]


# Writes a token's key and value, merges its victim and adds the group's heads of the output.
Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def compiled_step(group: HeadGroup) -> Step:
    """By `kernels.decode_step`: float32 arithmetic on the CPU."""
    kernel = decode_step(group.k.shape[-1], group.k.dtype)
    slots, nothing = group.slots, np.zeros((0, 1, 1), np.float32)
    heads, slot, now, first = (x.numpy() for x in (group.heads, slots.slot, slots.now, group.first))
    rounded, none = group.mean_k.dtype != group.k.dtype, np.zeros((0, 1, 1, 1), np.float32)
    means = [mean.numpy() if rounded else none for mean in (group.mean_k, group.mean_v)]
    buffers = (as_array(group.k), as_array(group.v), group.merge_slots, *means)

    def step(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        seen = nothing if slots.seen is None else slots.seen.numpy()
        new = tuple(x.float().numpy() for x in (q, k, v))
        made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        kernel(*new, heads, *buffers, slot, now, first, made.numpy(), seen, slots.peak)
        if made is not out:
            ours, theirs = (x.unflatten(1, (group.layer_heads, -1)) for x in (made, out))
            theirs[:, group.heads] = ours[:, group.heads].to(out.dtype)

    return step


def triton_step(group: HeadGroup) -> Step:
    """By `triton_kernels.decode_step`: a GPU."""
    from fewlines.attention.triton_kernels import decode_step  # where triton is

    slots = group.slots
    held = (group.k, group.v, group.merge_slots, group.mean_k, group.mean_v)

    def step(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        place = (slots.slot, slots.now, group.first, slots.seen, slots.peak)
        with torch.cuda.device_of(q):
            decode_step(q, k, v, out, group.heads, *held, *place)

    return step


def torch_step(group: HeadGroup) -> Step:
    """By torch's operators: any device, any precision. Sizes change only with the host's numbers
    in `Slots`, so a CUDA graph can be kept of it."""
    slots, heads, device = group.slots, group.heads, group.k.device
    entries, exact = torch.arange(group.k.shape[2], device=device), group.mean_k.dtype
    place = (
        torch.arange(len(group.k), device=device)[:, None],
        torch.arange(len(heads), device=device),
    )

    def write(k: Tensor, v: Tensor) -> None:
        where = (*place, slots.slot)
        if group.merge_slots and slots.evicting:
            band = slots.now[BAND]
            merged = slots.now[MERGED:].gather(0, band[None])[0]
            share = (slots.now[EVICTS].to(exact) / merged.clamp(min=1))[:, None]
            for mean, buffer in ((group.mean_k, group.k), (group.mean_v, group.v)):
                of_band = mean[:, place[1], band]
                mean[:, place[1], band] = of_band + (buffer[where] - of_band) * share
                buffer[:, :, -group.merge_slots :] = mean  # itself, where storage is exact
        group.k[where] = k[:, heads].to(group.k.dtype)
        group.v[where] = v[:, heads].to(group.v.dtype)

    def observe(weights: Tensor) -> None:
        assert slots.seen is not None
        slots.seen.scatter_(-1, slots.slot[..., None], 0)
        seen, new = slots.seen[..., : weights.shape[-1]], weights.mean(2).float()
        torch.maximum(seen, new, out=seen) if slots.peak else seen.add_(new)

    def step(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        write(k, v)
        q, r = q.unflatten(1, (k.shape[1], -1))[:, heads], q.shape[1] // k.shape[1]
        n = group.reads()
        # On the CPU 16 bits are storage only: arithmetic in them is slow, or not there.
        dtype = q.dtype if device.type == "cpu" else group.k.dtype
        keys, values = (x[:, :, :n].to(dtype) for x in (group.k, group.v))  # (B, G, n, D)
        bias = None
        if slots.shortest < n or group.padded:
            empty = entries[:n] >= slots.now[LENGTH, :, None]  # (G, n)
            bias = torch.zeros_like(empty, dtype=dtype).masked_fill(empty, -math.inf)
            if group.merge_slots and slots.evicted:
                bias[:, -group.merge_slots :] = slots.now[MERGED:].to(exact).log().T
            bias = bias[:, None]
            if group.padded:
                padding = entries[:n] < group.first[:, None]  # (B, n)
                bias = bias.masked_fill(padding[:, None, None], -math.inf)  # (B, G, 1, n)
        if slots.seen is None:
            y = F.scaled_dot_product_attention(q.to(dtype), keys, values, attn_mask=bias)
        else:
            scores = (q * q.shape[-1] ** -0.5).to(dtype) @ keys.transpose(2, 3)  # (B, G, r, n)
            weights = (scores if bias is None else scores + bias).softmax(-1)
            observe(weights)
            y = weights @ values
        out.unflatten(1, (-1, r))[:, heads] = y.to(out.dtype)

    return step


def stock_step(group: HeadGroup) -> Step:
    """As public code does: masked attention over the whole buffer, written or not. Where a token
    goes is a number of the device, so that one CUDA graph serves all steps."""
    slots, entries = group.slots, torch.arange(group.k.shape[2], device=group.k.device)

    def step(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for held, new in ((group.k, k), (group.v, v)):
            held.index_copy_(2, slots.slot[0, :1], new[:, :, None].to(held.dtype))
        q = q.unflatten(1, (group.k.shape[1], -1)).to(group.k.dtype)  # (B, H, r, D)
        mask = (entries < slots.now[LENGTH, 0]).expand(q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, group.k, group.v, attn_mask=mask)
        out.copy_(y.flatten(1, 2))

    return step


def fastest_step(device: torch.device, dtype: torch.dtype) -> Callable[[HeadGroup], Step]:
    """What makes the step of a group where it is, as it is stored."""
    if device.type == "cpu" and dtype in STORED:
        return compiled_step
    if device.type == "cuda" and machine.has_triton():
        return triton_step
    return torch_step


class BoundedCache:
    """The buffers of all layers for one batch; call it as the model's attention.

    The first call of a layer must bring the whole prefix; every later one, after an `advance`, the
    next image token.

    Args:
        plan: slots and victims, already checked against the capacity.
        dtype: what keys and values are stored in; on a GPU also what attention computes in.
        engine: `lean` reads what is written; `stock` and `stock-graph`, which a GPU replays, read
            the whole buffer under a mask and are for the full cache.
    """

    def __init__(
        self,
        plan: EvictionPlan,
        batch: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        engine: Engine = "lean",
    ) -> None:
        assert engine == "lean" or plan.is_full, "the stock engine is for the full cache"
        geometry, device = plan.geometry, torch.device(device)
        self.plan = plan
        self.position = 0
        # Entries of each row before these are padding, of a prompt that is shorter than others.
        self.first = torch.zeros(batch, dtype=torch.long, device=device)
        if device.type == "cpu":  # the model's own compiled kernels run beside a stock cache too
            follow_torch_threads()
        make = fastest_step(device, dtype) if engine == "lean" else stock_step
        self.sized = make is torch_step
        self.layers: list[list[HeadGroup]] = []
        for layer in range(geometry.layers):
            both = np.stack([plan.capacity[layer], plan.merge_slots[layer]])
            alike, index = np.unique(both, axis=1, return_inverse=True)
            self.layers.append(
                [
                    HeadGroup(
                        plan,
                        layer,
                        np.flatnonzero(index == group).tolist(),
                        batch,
                        head_dim,
                        dtype,
                        device,
                        self.first,
                    )
                    for group in range(alike.shape[1])
                ]
            )
        self.tables = Tables([group.slots for group in self._groups()], device)
        self.steps = [[make(group) for group in groups] for groups in self.layers]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held, prefix and merge slots included."""
        return sum(group.bytes for group in self._groups())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as an `Attend` does."""
        groups, geometry = self.layers[layer], self.plan.geometry
        if self.position == 0:
            assert q.shape[2] == geometry.prefix, "the whole prefix comes first, in one call"
            self.write_prefix(layer, k, v)
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            q, k, v = (x.squeeze(2) for x in (q, k, v))
            y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            for group, step in zip(groups, self.steps[layer], strict=True):
                group.slots.observe(q)
                step(q, k, v, y)
            y = y.unsqueeze(2)
        return y

    def pad(self, first: Tensor) -> None:
        """Leave out what comes before the entries `first` `(B,)` of each row's prefix."""
        self.first.copy_(first)
        for group in self._groups():
            group.padded = bool(first.any())

    def write_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `(B, H, P, D)` of a layer's prefix."""
        for group in self.layers[layer]:
            group.write_prefix(k, v)

    def stay(self) -> None:
        """Let the next token overwrite the newest one: what comes after the image is not kept."""
        self.position += 1
        for group in self._groups():
            group.slots.evicting = False
            group.slots.now[EVICTS].zero_()

    def advance(self, step: int) -> None:
        """To image token `step`, whose key and value the next calls bring."""
        self.position = self.plan.geometry.prefix + step
        for group in self._groups():
            group.slots.advance(step, group.k, group.v)
        self.tables.advance(step)

    @property
    def signature(self) -> tuple[object, ...]:
        """The signatures of all groups."""
        return tuple(group.signature(self.sized) for group in self._groups())

    def seek(self, step: int) -> None:
        """As if all image tokens before `step` had come: for instruments."""
        for group in self._groups():
            group.slots.seek(step)

    def fill(self, generator: torch.Generator) -> None:
        """Put random keys and values everywhere: for instruments."""
        for group in self._groups():
            for held in (group.k, group.v, group.mean_k, group.mean_v):
                held.copy_(torch.randn(held.shape[-1:], generator=generator))

    def _groups(self) -> Iterator[HeadGroup]:
        return itertools.chain.from_iterable(self.layers)
