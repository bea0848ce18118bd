"""What a model asks of whoever calls it: attention over the keys and values that the caller keeps.

The model never sees a cache. Training passes causal attention, likelihood and training with a cache
in the loop a `TeacherForced` or a `LineParallel`, the decode loop a `BoundedCache`.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention over whatever the caller keeps."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in one layer.

        Args:
            layer: its number.
            q: queries `(B, Hq, T, D)`, rotated.
            k: new keys `(B, H, T, D)`, rotated.
            v: new values `(B, H, T, D)`.

        Returns:
            `(B, Hq, T, D)`.
        """
        ...


def attend_causally(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from every position to itself and all before it: an `Attend`."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
