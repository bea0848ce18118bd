"""A cache in one parallel forward: the attention of teacher-forced likelihood and of training.

Exactly the distribution that decoding under the same `EvictionPlan` has, in `O(N · C)`: blocks of
queries, each with the tokens that any of its queries sees, and for merged victims the mean of
their keys and values from running sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.attention.attend import Attend, attend_causally
from fewlines.cache.plan import EvictionPlan

LINES = 2  # of queries in a block: wider ones see more in vain, narrower ones gather more often


class TeacherForced:
    """Attention over the prefix and all image tokens but the last, as the cache would limit it."""

    def __init__(
        self,
        plan: EvictionPlan,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan = plan
        self.layers = []  # of each, heads of as many merge slots and their limits
        for evicted_at, merge_slots in zip(plan.evicted_at, plan.merge_slots, strict=True):
            groups = []
            for count in np.unique(merge_slots).tolist():
                heads = np.flatnonzero(merge_slots == count)
                evicted = torch.from_numpy(evicted_at[heads])
                limits = Limits(evicted, plan, count, dtype, device)
                groups.append((torch.from_numpy(heads).to(device), limits))
            self.layers.append(groups)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as an `Attend` does."""
        groups = self.layers[layer]
        if len(groups) == 1:
            return groups[0][1].attend(q, k, v)
        queries = q.unflatten(1, (k.shape[1], -1))  # (B, H, r, T, D)
        parts = [
            limits.attend(queries[:, heads].flatten(1, 2), k[:, heads], v[:, heads])
            for heads, limits in groups
        ]
        sorted_by_group = torch.cat(
            [
                part.unflatten(1, (len(heads), -1))
                for part, (heads, _) in zip(parts, groups, strict=True)
            ],
            1,
        )
        order = torch.cat([heads for heads, _ in groups]).argsort()
        return sorted_by_group[:, order].flatten(1, 2)


def leave_uncompiled() -> None:
    """Keep limited attention out of what torch compiles from now on in this process: it would be a
    graph for every layer and cache. As a decorator this would cost every start a second."""
    TeacherForced.__call__ = torch.compiler.disable(TeacherForced.__call__)  # type: ignore[method-assign]


def limit_head(plan: EvictionPlan, at: int, head: int, device: torch.device) -> Attend:
    """Make an attention in which one head is limited as a cache limits it, all others are causal.

    Args:
        plan: the evictions.
        at: the layer of the head.
        head: its number there.
        device: where queries, keys and values will lie.
    """
    evicted_at = torch.from_numpy(plan.evicted_at[at, head, None])
    merge_slots = int(plan.merge_slots[at, head])
    limits = Limits(evicted_at, plan, merge_slots, torch.float32, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend_causally(layer, q, k, v)
        if layer == at:
            queries, own = q.unflatten(1, (k.shape[1], -1))[:, head], slice(head, head + 1)
            limited = limits.attend(queries, k[:, own], v[:, own])
            y.unflatten(1, (k.shape[1], -1))[:, head] = limited
        return y

    return attend


class Limits:
    """What the queries of a layer's heads see: of image token `q`, the prefix, every token `k` with
    `k ≤ q < evicted_at[k]`, and the merge slots of those that went before.

    `S` blocks of `c` queries see `M` tokens each, the prefix first; where fewer are seen, some that
    the mask hides fill up.

    Args:
        evicted_at: the step that evicts each token, `(H, N)`, or `(B, H, N)` where rows differ.
        merge_slots: of each head; 0 where victims are dropped.
        unread: what queries do not look at, `(B, H, N, N)`; None where they look at all they see.
    """

    def __init__(
        self,
        evicted_at: Tensor,
        plan: EvictionPlan,
        merge_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        unread: Tensor | None = None,
    ) -> None:
        P, n = plan.geometry.prefix, plan.geometry.n_tokens - 1
        self.prefix, self.block = P, min(LINES * plan.geometry.width, n)
        every = evicted_at if evicted_at.dim() == 3 else evicted_at[None]
        evicted = every[..., None, :n].cpu()  # (b, H, 1, n), b is B or 1
        token = torch.arange(n)
        query = torch.arange(-(-n // self.block) * self.block).view(-1, self.block)  # (S, c)
        first, last = query[:, :1], query[:, -1:]
        seen = (token <= last) & (evicted > torch.maximum(first, token))  # (b, H, S, n)
        most = int(seen.sum(-1).max())
        tokens = seen.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
        leaves = evicted.expand(seen.shape).gather(-1, tokens)[..., None, :]  # (b, H, S, 1, M−P)
        came = tokens[..., None, :] <= query[..., None]
        looks = came & (leaves > query[..., None])  # (b, H, S, c, M−P)
        if unread is not None:
            rows = F.pad(unread[..., :n, :n], (0, 0, 0, query.numel() - n))
            of_blocks = rows.cpu().unflatten(2, query.shape)  # (B, H, S, c, n)
            looks &= ~of_blocks.gather(-1, tokens[..., None, :].expand_as(looks))
        sees = F.pad(looks, (P, 0), value=True)  # (b, H, S, c, M)
        before = torch.arange(P).expand(*tokens.shape[:-1], P)
        self.rows = torch.cat([before, tokens + P], dim=-1).to(device)  # (b, H, S, M)
        self.bias = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, -math.inf).to(device)
        band = torch.from_numpy(plan.geometry.band(token.numpy(), merge_slots))
        never = plan.geometry.n_tokens
        self.merge_slots = []
        for each in range(merge_slots):
            of_band = evicted[..., 0, :].masked_fill(band != each, never)
            ordered, order = of_band.sort(dim=-1, stable=True)
            asking = query.flatten().repeat(*ordered.shape[:-1], 1)
            count = torch.searchsorted(ordered.contiguous(), asking, right=True)
            victims = (order[..., : int(count.max())] + P).to(device)
            log_count = count.to(dtype).log().unflatten(-1, query.shape).to(device)
            self.merge_slots.append(_MergeSlot(victims, count.to(device), log_count, self.block))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, H·r, T, D)` → `(B, H·r, T, D)`."""
        P, (_, H, T, D) = self.prefix, k.shape
        prefix = F.scaled_dot_product_attention(
            q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, enable_gqa=q.shape[1] != H
        )
        grouped = q[:, :, P:].unflatten(1, (H, -1)) * D**-0.5  # (B, H, r, n, D)
        missing = -(T - P) % self.block
        blocks = F.pad(grouped, (0, 0, 0, missing)).unflatten(3, (-1, self.block))
        asked = blocks.transpose(2, 3).flatten(3, 4)  # (B, H, S, r·c, D)
        keys, values = (pick_rows(x, self.rows) for x in (k, v))  # (B, H, S, M, D)
        scores = (asked @ keys.transpose(-1, -2)).unflatten(3, (-1, self.block))
        scores = scores + self.bias[..., None, :, :]  # (B, H, S, r, c, M)
        means = []  # of values
        for slot in self.merge_slots:
            mean_k, mean_v = (slot.means(x)[:, :, :, None] for x in (k, v))  # (B, H, S, 1, c, D)
            score = (asked.unflatten(3, (-1, self.block)) * mean_k).sum(-1)
            score = score + slot.log_count[..., None, :]
            scores = torch.cat([scores, score[..., None]], dim=-1)
            means.append(mean_v)
        weights = scores.softmax(-1)
        M = keys.shape[3]
        own = weights[..., :M].flatten(3, 4)
        y = (own @ values).unflatten(3, (-1, self.block))
        for index, mean_v in enumerate(means, start=M):
            y = y + weights[..., index, None] * mean_v
        image = y.transpose(2, 3).flatten(3, 4)[..., : T - P, :].flatten(1, 2)
        return torch.cat([prefix, image.to(prefix.dtype)], dim=2)


@dataclass(frozen=True)
class _MergeSlot:
    """The victims that share a merge slot, in the order of eviction.

    Attributes: `victims` `(b, H, V)`, rows of keys and values; `count` `(b, H, S·c)`, how many were
    evicted before each query; `log_count` `(b, H, S, c)`; `block`, queries of a block.
    """

    victims: Tensor
    count: Tensor
    log_count: Tensor
    block: int

    def means(self, x: Tensor) -> Tensor:
        """Average the rows of `(B, H, T, D)` evicted before each query: `(B, H, S, c, D)`."""
        victims = pick_rows(x, self.victims)
        victims = victims.to(torch.promote_types(x.dtype, torch.float32))  # sums of up to N vectors
        sums = pick_rows(F.pad(victims.cumsum(2), (0, 0, 1, 0)), self.count)
        means = (sums / self.count.clamp(min=1)[..., None]).to(x.dtype)
        in_blocks: Tensor = means.unflatten(2, (-1, self.block))
        return in_blocks


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Pick rows `(b, H, …)` of `(B, H, T, D)`, where `b` is `B` or 1: `(B, H, …, D)`.

    As `gather` with an expanded index does, three times as fast.
    """
    B, H, T, _ = x.shape
    first = torch.arange(0, B * H * T, T, device=x.device)
    index = first.view(B, H, *[1] * (rows.dim() - 2)) + rows
    return x.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, x.shape[-1])
