"""A cache in one parallel forward: the attention of teacher-forced likelihood and of training.

Exactly the distribution that decoding under the same `Placement` has: a fixed mask per head, and
for folded victims the mean of their keys and values by a fixed matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.placement import Placement


class TeacherForced:
    """Attention over the prefix and all image tokens but the last, as the cache would limit it."""

    def __init__(
        self,
        placement: Placement,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.limits = [
            Limits(torch.from_numpy(evicted), placement, dtype, device)
            for evicted in placement.evicted_at
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.limits[layer].attend(q, k, v)


class Limits:
    """What the queries of one layer see.

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
        evicted = evicted_at[..., None, :n].cpu()  # (…, H, 1, k)
        step = torch.arange(n)[:, None]  # (q, 1)
        gone = evicted <= step  # (…, H, q, k)
        resident = (torch.arange(n) <= step) & ~gone
        shape = (*resident.shape[:-2], P + n, P + n)
        mask = torch.ones(shape, dtype=torch.bool).tril()
        mask[..., P:, P:] = resident
        self.mask = mask.to(device)
        self.fold = placement.fold
        if self.fold:
            folded = torch.zeros(shape, dtype=dtype)
            folded[..., P:, P:] = gone
            count = folded.sum(-1)  # (…, H, T)
            self.average = (folded / count.clamp(min=1)[..., None]).to(device)
            self.log_count = count.log().to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, H·r, T, D)` → `(B, H·r, T, D)`."""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        mask = self._of(self.mask, groups, 3)
        if not self.fold:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        average = self._of(self.average, groups, 3).to(k.dtype)
        mean_k, mean_v = average @ k, average @ v  # (B, Hq, T, D), each query's summary
        scale = q.shape[-1] ** -0.5
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
        summary = (q * mean_k).sum(-1, keepdim=True) * scale
        summary = summary + self._of(self.log_count, groups, 2)[..., None]
        weights = torch.cat([scores, summary], dim=-1).softmax(-1)
        return weights[..., :-1] @ v + weights[..., -1:] * mean_v

    @staticmethod
    def _of(per_head: Tensor, groups: int, dims: int) -> Tensor:
        return per_head.repeat_interleave(groups, dim=-dims) if groups > 1 else per_head
