"""The eviction oracle: the schedule of an image that is known already. An instrument, no cache.

Before each query, each head evicts the resident that the remaining queries of this very image look
at least in the full-cache run: Belady's rule. Whatever picks victims without merging them is
compared with it; likelihood is all that can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewlines.cache.policy import OraclePolicy


@dataclass(frozen=True)
class Oracle(OraclePolicy):
    """Belady's rule with this image's own attention under a full cache."""

    name: ClassVar[str] = "oracle"

    def find_evictions(self, attention: Tensor, capacity: Tensor) -> Tensor:
        """Find the evictions of these very images."""
        n = attention.shape[-1]
        future = attention.flip(-2).cumsum(-2).flip(-2)  # of queries from each one on
        resident = torch.zeros(attention.shape[:-1], dtype=torch.bool)  # (B, H, N)
        evicted = torch.full(resident.shape, n)
        for step in range(n):
            full = resident.sum(-1) == capacity  # (B, H)
            score = future[:, :, step].masked_fill(~resident, torch.inf)
            victim = score.argmin(-1, keepdim=True)
            victims = torch.zeros_like(resident).scatter(-1, victim, full[..., None])
            evicted[victims] = step
            resident &= ~victims
            resident[..., step] = True
        return evicted
