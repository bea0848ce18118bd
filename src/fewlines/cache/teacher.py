"""A cache in one parallel forward: the attention of teacher-forced likelihood and of training.

Exactly the distribution that decoding under the same `Placement` has, in `O(N · C)`: blocks of
queries, each with the tokens that any of its queries sees, and for folded victims the mean of
their keys and values from running sums.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.placement import Placement

LINES = 2  # of queries in a block: wider ones see more in vain, narrower ones gather more often


class TeacherForced:
    """Attention over the prefix and all image tokens but the last, as the cache would limit it."""

    def __init__(
        self,
        placement: Placement,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.placement = placement
        self.limits = [
            Limits(torch.from_numpy(evicted), placement, dtype, device)
            for evicted in placement.evicted_at
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.limits[layer].attend(q, k, v)


class Limits:
    """What the queries of one layer see: of image token `q`, the prefix and every token `k` with
    `k ≤ q < evicted_at[k]`.

    `S` blocks of `c` queries see `M` tokens each, the prefix first; where fewer are seen, some that
    the mask hides fill up.

    Args:
        evicted_at: the step at which each token goes, `(H, N)`, or `(B, H, N)` where rows differ.
    """

    def __init__(
        self,
        evicted_at: Tensor,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        P, n = placement.geometry.prefix, placement.geometry.n_tokens - 1
        self.prefix, self.block = P, min(LINES * placement.geometry.width, n)
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
        sees = F.pad(came & (leaves > query[..., None]), (P, 0), value=True)  # (b, H, S, c, M)
        before = torch.arange(P).expand(*tokens.shape[:-1], P)
        self.rows = torch.cat([before, tokens + P], dim=-1).to(device)  # (b, H, S, M)
        self.bias = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, -math.inf).to(device)
        self.fold = placement.fold
        if self.fold:
            goes, order = evicted[..., 0, :].sort(dim=-1, stable=True)
            asking = query.flatten().repeat(*goes.shape[:-1], 1)
            count = torch.searchsorted(goes.contiguous(), asking, right=True)
            self.victims = (order[..., : int(count.max())] + P).to(device)  # in the order they go
            self.count = count.to(device)  # (b, H, S·c), victims before each query
            self.log_count = count.to(dtype).log().unflatten(-1, query.shape).to(device)

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
        keys, values = (_pick(x, self.rows) for x in (k, v))  # (B, H, S, M, D)
        scores = (asked @ keys.transpose(-1, -2)).unflatten(3, (-1, self.block))
        scores = scores + self.bias[..., None, :, :]  # (B, H, S, r, c, M)
        if self.fold:
            mean_k, mean_v = (self._means(x)[:, :, :, None] for x in (k, v))  # (B, H, S, 1, c, D)
            summary = (asked.unflatten(3, (-1, self.block)) * mean_k).sum(-1)
            summary = summary + self.log_count[..., None, :]
            scores = torch.cat([scores, summary[..., None]], dim=-1)
        weights = scores.softmax(-1)
        own = weights[..., : keys.shape[3]].flatten(3, 4)
        y = (own @ values).unflatten(3, (-1, self.block))
        if self.fold:
            y = y + weights[..., -1:] * mean_v
        image = y.transpose(2, 3).flatten(3, 4)[..., : T - P, :].flatten(1, 2)
        return torch.cat([prefix, image.to(prefix.dtype)], dim=2)

    def _means(self, x: Tensor) -> Tensor:
        """Of the rows of `(B, H, T, D)` that have gone before each query, `(B, H, S, c, D)`."""
        gone = _pick(x, self.victims)
        gone = gone.to(torch.promote_types(x.dtype, torch.float32))  # sums of up to N vectors
        sums = _pick(F.pad(gone.cumsum(2), (0, 0, 1, 0)), self.count)
        means = (sums / self.count.clamp(min=1)[..., None]).to(x.dtype)
        in_blocks: Tensor = means.unflatten(2, (-1, self.block))
        return in_blocks


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `(b, H, …)` of `(B, H, T, D)`, where `b` is `B` or 1 → `(B, H, …, D)`."""
    B, H, T, _ = x.shape
    first = torch.arange(0, B * H * T, T, device=x.device)
    index = first.view(B, H, *[1] * (rows.dim() - 2)) + rows
    return x.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, x.shape[-1])
