"""DiagonalAttn (arXiv 2609.19702), our reading of how others describe it: head by head and image
by image, with no calibration, the offsets are found that queries hardly look at, and not read.

It saves reads, not memory: all of the window stays resident, since what lies at an offset that is
skipped lies at another one a step later. At equal memory it reads a part of what `lines` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.policy import OraclePolicy
from fewlines.schema import Mass


@dataclass(frozen=True)
class DiagonalOnline(OraclePolicy):
    """The last tokens are resident, of which each query reads a share `read`. Until the window is
    full, whenever one more would be read, the offset that the last query looked at least is
    skipped from then on; the newest token is read always."""

    name: ClassVar[str] = "diagonal_online"
    read: Mass = 0.5

    def find_evictions(self, attention: Tensor, capacity: Tensor) -> Tensor:
        """Find the evictions: the oldest token is evicted."""
        n = attention.shape[-1]
        leaves = (torch.arange(n) + capacity[:, None]).clamp(max=n)
        return leaves.expand(attention.shape[:-1])

    def find_unread(self, attention: Tensor, capacity: Tensor) -> Tensor:
        """Find the residents at skipped offsets."""
        n = attention.shape[-1]
        skipped_at = torch.full(attention.shape[:-1], n)  # (B, H, N), the step, of each offset
        most = (self.read * capacity).round().clamp(min=1)  # (H,)
        for step in range(1, min(n, int(capacity.max()))):
            read = skipped_at[..., : step + 1] > step  # (B, H, step + 1)
            score = attention[:, :, step - 1, : step - 1].flip(-1)  # of offsets from 1 on
            score = F.pad(score, (0, 1), value=2.0)  # nobody has looked as far back as this yet
            score = score.masked_fill(~read[..., 1:], torch.inf)
            offset = 1 + score.argmin(-1, keepdim=True)
            more = (read.sum(-1) > most) & (step < capacity)
            earlier = skipped_at.gather(-1, offset)
            skipped_at.scatter_(-1, offset, torch.where(more[..., None], step, earlier))
        query = torch.arange(n)
        offset = (query[:, None] - query).clamp(min=0).expand(*attention.shape)
        when = skipped_at[:, :, None].expand(attention.shape).gather(-1, offset)
        unread: Tensor = when <= query[:, None]
        return unread
