"""The bounded key-value buffer of a batch. It is the attention of the decode loop.

Keys are stored after RoPE, so where an entry lies does not matter: a new token overwrites its
victim's slot. Nothing is moved, nothing grows, and no attention call ever sees more than the
prefix and the capacity, the token being decoded included.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.placement import Placement
from fewlines.cache.policy import NOBODY

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
        slots = placement.slots[layer, heads].T + self.prefix  # (N, Hg)
        has_victim = placement.victims[layer, heads].T != NOBODY
        self.same = (slots == slots[:, :1]).all(1) & (has_victim == has_victim[:, :1]).all(1)
        self.slots = torch.from_numpy(slots).to(device)
        self.has_victim = torch.from_numpy(has_victim).to(device)
        self.first_slot, self.first_has_victim = slots[:, 0].tolist(), has_victim[:, 0].tolist()
        # Entries that are written or may be after each step: what attention has to read.
        written = np.maximum.accumulate(slots, axis=0) + 1  # (N, Hg)
        folding = np.logical_or.accumulate(has_victim.any(1)) & self.fold
        self.length = np.where(folding, entries, written.max(1)).tolist()
        self.ragged = (folding | (written.min(1) < written.max(1))).tolist()
        self.folded = torch.zeros(len(heads), dtype=dtype, device=device)
        self.rows = torch.arange(len(heads), device=device)

    @property
    def bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def write_prefix(self, k: Tensor, v: Tensor) -> None:
        self.k[:, :, : self.prefix] = k
        self.v[:, :, : self.prefix] = v

    def write(self, step: int, k: Tensor, v: Tensor) -> None:
        """Put token `step`, `(B, Hg, 1, D)`, into its slot; fold whoever is there, if it folds."""
        if self.same[step]:
            slot = self.first_slot[step]
            if self.fold and self.first_has_victim[step]:
                self.folded += 1
                for buffer in (self.k, self.v):
                    mean = buffer[:, :, -1]
                    mean.add_((buffer[:, :, slot] - mean) / self.folded[:, None])
                self.bias[:, 0, -1] = self.folded.log()
            self.k[:, :, slot] = k[:, :, 0]
            self.v[:, :, slot] = v[:, :, 0]
            self.bias[:, 0, slot] = 0
            return
        slots = self.slots[step]
        if self.fold:
            victims = self.has_victim[step]
            self.folded += victims
            share = victims / self.folded.clamp(min=1)
            for buffer in (self.k, self.v):
                mean = buffer[:, :, -1]
                mean.add_((buffer[:, self.rows, slots] - mean) * share[:, None])
            self.bias[:, 0, -1] = self.folded.log()
        self.k[:, self.rows, slots] = k[:, :, 0]
        self.v[:, self.rows, slots] = v[:, :, 0]
        self.bias[self.rows, 0, slots] = 0

    def attend(self, step: int, q: Tensor) -> Tensor:
        """Queries `(B, Hg, r, D)`, `r` of them to a key-value head → `(B, Hg, r, D)`."""
        n = self.length[step]
        B, H, r, D = q.shape
        k, v = (buffer[:, :, :n].flatten(0, 1) for buffer in (self.k, self.v))
        q = q.reshape(B * H, r, D) * D**-0.5
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, r, n)
        if self.ragged[step]:
            scores += self.bias[..., :n]
        return torch.bmm(scores.softmax(-1).view(B * H, r, n), v).view(B, H, r, D)

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
            group.write(step, *self._of(group, k, v))
            (group_q,) = self._of(group, q)
            stock = self.engine == "stock"
            parts.append(group.attend_to_all(group_q) if stock else group.attend(step, group_q))
        if len(parts) == 1:
            return parts[0].flatten(1, 2).unsqueeze(2)
        order = np.argsort(np.concatenate([group.heads for group in groups]))
        return torch.cat(parts, dim=1)[:, order].flatten(1, 2).unsqueeze(2)

    def _of(self, group: HeadGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The group's heads of tensors `(B, H, …)`."""
        if len(group.heads) == self.placement.geometry.heads:
            return tensors
        return tuple(tensor[:, group.heads] for tensor in tensors)
