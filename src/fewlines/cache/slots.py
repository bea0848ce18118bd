"""Where the next token goes: read from a table, or ranked by a policy once per line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Placement
from fewlines.cache.policy import NOBODY, ScoringPolicy


class Write(NamedTuple):
    """One step of a group of heads.

    Attributes:
        slot: of the new token: one for all, `(H,)` per head, or `(B, H)` per row and head.
        evicts: whether somebody is there, for all or `(H,)` per head.
        length: entries that attention has to read, from the first on.
        ragged: whether some of these are empty or summaries, so that the bias counts.
    """

    slot: int | Tensor
    evicts: bool | Tensor
    length: int
    ragged: bool


def comparable(score: Tensor) -> Tensor:
    """Scores to 12 bits, so that the rounding of a sum never decides between equals: the keys of
    equal codes have equal norms, but for their last bit."""
    mantissa, exponent = torch.frexp(score.float())
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


class Slots(ABC):
    """The writes of a group of heads, step by step."""

    bytes = 0

    @abstractmethod
    def write(self, step: int, keys: Tensor) -> Write:
        """Where token `step` goes; `keys` `(B, H, E, D)` are the group's buffer."""

    def observe(self, step: int, weights: Tensor) -> None:  # noqa: B027
        """See the attention `(B, H, r, n)` that the query of `step` gave to the first `n` slots."""

    @property
    def observes(self) -> bool:
        return False


class TableSlots(Slots):
    """The slots of a placement whose victims are known: the same for every row."""

    def __init__(
        self,
        placement: Placement,
        layer: int,
        heads: list[int],
        entries: int,
        device: torch.device,
    ) -> None:
        slots = placement.slots[layer, heads].T + placement.geometry.prefix  # (N, H)
        evicts = placement.known_victims[layer, heads].T != NOBODY
        same = (slots == slots[:, :1]).all(1) & (evicts == evicts[:, :1]).all(1)
        written = np.maximum.accumulate(slots, axis=0) + 1
        folding = np.logical_or.accumulate(evicts.any(1)) & placement.fold
        length = np.where(folding, entries, written.max(1)).tolist()
        ragged = (folding | (written.min(1) < written.max(1))).tolist()
        self.writes = [
            Write(int(slot[0]), bool(evict[0]), *read)
            if alike
            else Write(torch.tensor(slot, device=device), torch.tensor(evict, device=device), *read)
            for alike, slot, evict, *read in zip(same, slots, evicts, length, ragged, strict=True)
        ]

    def write(self, step: int, keys: Tensor) -> Write:
        return self.writes[step]


class RankedSlots(Slots):
    """The slots that a scoring policy picks, row by row, at the start of every line."""

    def __init__(
        self,
        placement: Placement,
        policy: ScoringPolicy,
        batch: int,
        heads: int,
        entries: int,
        device: torch.device,
    ) -> None:
        self.policy, self.geometry = policy, placement.geometry
        self.prefix, self.entries, self.fold = self.geometry.prefix, entries, placement.fold
        self.room = entries - self.prefix - placement.fold
        self.every = min(self.geometry.width, self.room)
        shape = (batch, heads, self.room)
        self.positions = torch.full(shape, NOBODY, device=device)
        self.victims = self.positions[..., :0]  # (B, H, ·), slots in the order they go
        self.next = 0
        wants = policy.needs
        width = self.geometry.width if "attention" in wants else 0
        self.history = torch.zeros(batch, heads, width, self.room, device=device)
        self.total = torch.zeros(shape if "total" in wants else (0,), device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.heads = torch.arange(heads, device=device)

    @property
    def bytes(self) -> int:  # type: ignore[override]
        """Bytes of the policy's own bookkeeping."""
        return self.positions.nbytes + self.history.nbytes + self.total.nbytes

    @property
    def observes(self) -> bool:
        return bool(self.policy.needs)

    def write(self, step: int, keys: Tensor) -> Write:
        if step % self.every == 0:
            self._rank(step, keys)
        if step < self.room:
            self.positions[..., step] = step
            return Write(self.prefix + step, False, self.prefix + step + 1, False)
        slot = self.victims[..., self.next]  # (B, H)
        self.next += 1
        self.positions[self.rows, self.heads, slot] = step
        if self.history.numel():
            self.history[self.rows, self.heads, :, slot] = 0
        if self.total.numel():
            self.total[self.rows, self.heads, slot] = 0
        return Write(slot + self.prefix, True, self.entries, self.fold)

    def _rank(self, step: int, keys: Tensor) -> None:
        """Fix the order in which residents go until the next ranking."""
        resident = min(step, self.room)
        going = max(0, step + self.every - max(step, self.room))
        self.next = 0
        if going == 0:
            return
        view = RankedView(self, step, resident, keys)
        score = comparable(self.policy.score(view))
        oldest_first = view.positions.argsort(-1)
        order = score.gather(-1, oldest_first).argsort(stable=True, dim=-1)
        self.victims = oldest_first.gather(-1, order)[..., :going]

    def observe(self, step: int, weights: Tensor) -> None:
        seen = weights[..., self.prefix : self.prefix + self.room].float().mean(2)  # (B, H, n)
        n = seen.shape[-1]
        if self.history.numel():
            self.history[:, :, step % self.geometry.width, :n] = seen
        if self.total.numel():
            self.total[..., :n] += seen


@dataclass(frozen=True)
class RankedView:
    """What `RankedSlots` lets its policy see: a `View`."""

    slots: RankedSlots
    step: int
    resident: int
    buffer: Tensor

    @property
    def geometry(self) -> Geometry:
        return self.slots.geometry

    @property
    def positions(self) -> Tensor:
        return self.slots.positions[..., : self.resident]

    @property
    def keys(self) -> Tensor:
        start = self.slots.prefix
        return self.buffer[:, :, start : start + self.resident]

    @property
    def attention(self) -> Tensor:
        width = self.geometry.width
        oldest = self.step % width if self.step >= width else 0
        history = self.slots.history.roll(-oldest, dims=2)
        return history[:, :, : min(self.step, width), : self.resident]

    @property
    def total(self) -> Tensor:
        return self.slots.total[..., : self.resident]
