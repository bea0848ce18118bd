"""The bounded key-value buffer of a batch. It is the attention of the decode loop.

Keys are stored after RoPE, so where an entry lies does not matter: a new token overwrites its
victim's slot. Nothing is moved, nothing grows, and no attention call ever sees more than the
prefix and the capacity, the token being decoded included.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.placement import Placement
from fewlines.cache.slots import RankedSlots, Slots, TableSlots, Write

Engine = Literal["lean", "stock"]


class HeadGroup:
    """The heads of a layer that have equal capacity, in one buffer.

    Slots: the prefix `0 … P−1`, then the tokens, then the summary if victims are folded.
    """

    def __init__(
        self,
        placement: Placement,
        layer: int,
        heads: list[int],
        batch: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.heads = heads
        self.prefix = placement.geometry.prefix
        self.fold = placement.fold
        entries = self.prefix + int(placement.capacity[layer, heads[0]])
        shape = (batch, len(heads), entries, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # Additive bias of each slot: 0 for a token, log n for a summary of n, -inf for nothing yet.
        self.bias = torch.full((len(heads), 1, entries), -math.inf, dtype=dtype, device=device)
        self.bias[..., : self.prefix] = 0
        self.slots: Slots = (
            TableSlots(placement, layer, heads, entries, device)
            if placement.scoring is None
            else RankedSlots(placement, placement.scoring, batch, len(heads), entries, device)
        )
        self.folded = torch.zeros(len(heads), dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.columns = torch.arange(len(heads), device=device)

    @property
    def bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def write_prefix(self, k: Tensor, v: Tensor) -> None:
        self.k[:, :, : self.prefix] = k
        self.v[:, :, : self.prefix] = v

    def write(self, step: int, k: Tensor, v: Tensor) -> Write:
        """Put token `step`, `(B, H, 1, D)`, into its slot; fold whoever is there, if it folds."""
        write = self.slots.write(step, self.k)
        place = self._place(write.slot)
        if self.fold and write.evicts is not False:
            self.folded += write.evicts
            share = (write.evicts / self.folded.clamp(min=1))[:, None]
            for buffer in (self.k, self.v):
                mean = buffer[:, :, -1]
                mean.add_((buffer[place] - mean) * share)
            self.bias[:, 0, -1] = self.folded.log()
        self.k[place] = k[:, :, 0]
        self.v[place] = v[:, :, 0]
        if write.evicts is not True:  # a slot that was taken has its bias already
            self.bias[self.columns, 0, write.slot] = 0
        return write

    def _place(self, slot: int | Tensor) -> tuple[Any, ...]:
        """The index of a slot in `(B, H, E, D)`."""
        if isinstance(slot, int):
            return (slice(None), slice(None), slot)
        return (slice(None) if slot.ndim == 1 else self.rows, self.columns, slot)

    def attend(self, step: int, write: Write, q: Tensor) -> Tensor:
        """Queries `(B, H, r, D)`, `r` of them to a key-value head → `(B, H, r, D)`."""
        n = write.length
        B, H, r, D = q.shape
        k, v = (buffer[:, :, :n].flatten(0, 1) for buffer in (self.k, self.v))
        q = q.reshape(B * H, r, D) * D**-0.5
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, r, n)
        if write.ragged:
            scores += self.bias[..., :n]
        weights = scores.softmax(-1)
        if self.slots.observes:
            self.slots.observe(step, weights)
        return torch.bmm(weights.view(B * H, r, n), v).view(B, H, r, D)

    def attend_to_all(self, q: Tensor) -> Tensor:
        """As public code does: masked attention over the whole buffer, written or not."""
        mask = self.bias.expand(-1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)


class BoundedCache:
    """The buffers of all layers for one batch; call it as the model's attention.

    The first call of a layer must bring the whole prefix, every later one the next image token.

    Args:
        placement: slots and victims, already checked against the capacity.
        engine: `lean` reads what is written; `stock` reads the whole buffer under a mask.
    """

    def __init__(
        self,
        placement: Placement,
        batch: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        engine: Engine = "lean",
    ) -> None:
        geometry = placement.geometry
        self.placement = placement
        self.engine = engine
        self.position = 0
        self.layers: list[list[HeadGroup]] = []
        for layer in range(geometry.layers):
            capacities = placement.capacity[layer]
            self.layers.append(
                [
                    HeadGroup(
                        placement,
                        layer,
                        np.flatnonzero(capacities == capacity).tolist(),
                        batch,
                        head_dim,
                        dtype,
                        torch.device(device),
                    )
                    for capacity in np.unique(capacities)
                ]
            )

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held, prefix and summaries included."""
        return sum(group.bytes for groups in self.layers for group in groups)

    @property
    def policy_bytes(self) -> int:
        """Bytes of the bookkeeping of a scoring policy; 0 where the victims are known."""
        return sum(group.slots.bytes for groups in self.layers for group in groups)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, geometry = self.layers[layer], self.placement.geometry
        if self.position == 0:
            assert q.shape[2] == geometry.prefix, "the whole prefix comes first, in one call"
            for group in groups:
                group.write_prefix(*self._of(group, k, v))
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            y = self._step(groups, self.position - geometry.prefix, q, k, v)
        if layer == geometry.layers - 1:
            self.position += q.shape[2]
        return y

    def _step(self, groups: list[HeadGroup], step: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, H, r, D)
        parts = []
        for group in groups:
            write = group.write(step, *self._of(group, k, v))
            (group_q,) = self._of(group, q)
            parts.append(
                group.attend_to_all(group_q)
                if self.engine == "stock"
                else group.attend(step, write, group_q)
            )
        if len(parts) == 1:
            return parts[0].flatten(1, 2).unsqueeze(2)
        order = np.argsort(np.concatenate([group.heads for group in groups]))
        return torch.cat(parts, dim=1)[:, order].flatten(1, 2).unsqueeze(2)

    def _of(self, group: HeadGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The group's heads of tensors `(B, H, …)`."""
        if len(group.heads) == self.placement.geometry.heads:
            return tensors
        return tuple(tensor[:, group.heads] for tensor in tensors)
