"""HeadKV (arXiv 2605.20600) as its abstract says: heads are typed early in the same image, and each
keeps its type for the rest of it. What heads hold differs from image to image: an instrument.

What is looked at, which head is local, and which tokens the others evict are our reading: the
paper's code is not published. The allocation `headkv` types heads from calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewlines.cache.policy import OraclePolicy
from fewlines.schema import Count, Mass, Share


@dataclass(frozen=True)
class HeadKVOnline(OraclePolicy):
    """Heads are typed when the first of them is full, by its last queries, as many as a share
    `recent` of its capacity. One that gave a share `mass` of its attention to so few last tokens
    that they are at most a share `near` of its capacity is local: it keeps only these and the first
    `sinks` tokens, which every head retains that has capacity for them, and what it frees is
    divided among the other heads of the layer. There the tokens least attended by as many last
    queries are evicted, those of these queries last."""

    name: ClassVar[str] = "headkv_online"
    mass: Mass = 0.9
    near: Share = 0.25
    recent: Mass = 0.5
    sinks: Count = 4

    def find_evictions(self, attention: Tensor, capacity: Tensor) -> Tensor:
        """Find the evictions of these very images."""
        n, first = attention.shape[-1], int(capacity.min())
        token = torch.arange(n)
        evicted = torch.full(attention.shape[:-1], n)  # (B, H, N)
        if first >= n:
            return evicted
        window = max(1, round(self.recent * first))
        local, holds = self._divide(attention[:, :, :first, :first], window, capacity)
        resident = (token < first).expand_as(evicted)
        for step in range(first, n):
            score = attention[:, :, step - window : step].mean(2)
            newest_last = local[..., None] | (token >= step - window)
            score = torch.where(newest_last, 1.0 + token, score)
            score = score.masked_fill(token < self.sinks, torch.inf)
            score = score.masked_fill(~resident, -torch.inf)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            evicts = resident & (rank >= holds[..., None] - 1)
            evicted[evicts] = step
            resident = (resident & ~evicts) | (token == step)
        return evicted

    def _divide(self, attention: Tensor, window: int, capacity: Tensor) -> tuple[Tensor, Tensor]:
        """Which heads are local, and what each may hold, both `(B, H)`, by the attention
        `(B, H, S, S)` of the last `window` queries."""
        steps = attention.shape[-1]
        query = torch.arange(steps - window, steps)[:, None]
        token = query - torch.arange(steps)  # a column for each distance
        index = token.clamp(min=0).expand(*attention.shape[:2], -1, -1)
        mass = attention[:, :, query[:, 0]].gather(-1, index).masked_fill(token < 0, 0)
        mass = mass.sum(2).cumsum(-1)
        reach = (mass < self.mass * mass[..., -1:]).sum(-1) + 1
        needs = reach + self.sinks
        local = (reach <= self.near * capacity) & (needs <= capacity)
        local &= ~local.all(-1, keepdim=True)  # nobody is there to take what they free
        frees = torch.where(local, capacity - needs, 0).sum(-1, keepdim=True)
        others = (~local).sum(-1, keepdim=True)
        extra = frees // others + ((~local).cumsum(-1) <= frees % others)
        return local, torch.where(local, needs, capacity + extra)
