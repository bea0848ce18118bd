"""Which entry the next token takes: read from a table, or ranked by a policy, once per line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import NO_VICTIM, ScoringPolicy, View

# Rows of `Slots.now`; from MERGED on there is one for each merge slot.
EVICTS, LENGTH, BAND, MERGED = range(4)


class Slots(ABC):
    """The writes of a group of `G` heads, step by step. The tensors stay where they are and change
    what they hold, so that a compiled kernel or a CUDA graph can keep their addresses.

    Attributes:
        slot: `(B, G)` int64, the entry that the new token takes.
        now: `(3 + S, G)` int64: whether a token is evicted; entries written, from the first on,
            merge slots not counted; which of `S` merge slots takes the victim; victims in each of
            them so far, that one included.
        shortest, longest: of the entries written.
        evicting: whether any head evicts at this step.
        evicted: whether any head has evicted, at this step or before.
        seen: `(B, G, E)` float32, where the attention on each entry is added up; None if nobody
            asks.
        peak: whether `seen` keeps the largest instead of the sum.
        table: `(N, 4 + S, G)`, the slots where they are known before, and then `now`, of every
            step.
    """

    slot: Tensor
    now: Tensor
    table: np.ndarray[Any, Any]
    shortest = longest = 0
    evicting = evicted = False
    seen: Tensor | None = None
    peak = False

    @abstractmethod
    def read(self, row: Tensor) -> None:
        """Follow a row `(4 + S, G)`, into which the table's will be copied step by step."""

    @abstractmethod
    def advance(self, step: int, keys: Tensor, values: Tensor) -> None:
        """To image token `step`; `keys` and `values` `(B, G, E, D)` are the group's buffers."""

    def observe(self, q: Tensor) -> None:  # noqa: B027
        """See the layer's queries `(B, H·r, D)` of the step."""

    @abstractmethod
    def seek(self, step: int) -> None:
        """As if all tokens before `step` had come: for instruments."""


class TableSlots(Slots):
    """The slots of a plan whose victims are known: the same for every row of the batch."""

    def __init__(self, plan: EvictionPlan, layer: int, heads: list[int], batch: int) -> None:
        geometry, merge_slots = plan.geometry, int(plan.merge_slots[layer, heads[0]])
        slots = plan.slots[layer, heads].T + geometry.prefix  # (N, G)
        victims = plan.known_victims[layer, heads].T
        evicts = victims != NO_VICTIM
        band = np.where(evicts, geometry.band(victims, merge_slots), 0)
        merged = [(evicts & (band == each)).cumsum(0) for each in range(merge_slots)]
        length = np.maximum.accumulate(slots, axis=0) + 1
        self.batch = batch
        self.table = np.stack([slots, evicts, length, band, *merged], axis=1)
        self.host = list(
            zip(
                length.min(1).tolist(),
                length.max(1).tolist(),
                evicts.any(1).tolist(),
                evicts.cumsum(0).any(1).tolist(),
                strict=True,
            )
        )

    def read(self, row: Tensor) -> None:
        """Follow a row `(4 + S, G)` of the table."""
        self.slot, self.now = row[0].expand(self.batch, -1), row[1:]

    def advance(self, step: int, keys: Tensor, values: Tensor) -> None:
        """Go to image token `step`."""
        self.shortest, self.longest, self.evicting, self.evicted = self.host[step]

    def seek(self, step: int) -> None:
        """The table has it all."""


class RankedSlots(Slots):
    """The slots that a scoring policy picks, row by row, at the start of every line."""

    def __init__(
        self,
        plan: EvictionPlan,
        policy: ScoringPolicy,
        layer: int,
        batch: int,
        heads: list[int],
        entries: int,
        device: torch.device,
    ) -> None:
        self.policy, self.geometry = policy, plan.geometry
        self.expectation = plan.get_expectation(layer, heads, device)
        self.prefix = self.geometry.prefix
        merges = int(plan.merge_slots[layer, heads[0]])
        self.capacity = entries - self.prefix - merges
        self.every = policy.interval(self.geometry, self.capacity)
        self.recorded = torch.full((batch, len(heads), self.capacity), NO_VICTIM, device=device)
        self.places = self.recorded[..., :0]  # (B, G, ·), slots that tokens take, `ranked` on
        self.ranked = self.noted = self.come = 0  # tokens so far, and those that are `recorded`
        steps = np.arange(self.geometry.n_tokens)
        length = self.prefix + np.minimum(steps + 1, self.capacity)
        merged = np.maximum(steps - self.capacity + 1, 0)
        first = np.zeros_like(steps)  # of the merge_slots, and the only one
        rows = [self.prefix + steps, steps >= self.capacity, length, first]
        known = np.stack([*rows, merged] if merges else rows, axis=1)
        self.table = np.repeat(known[..., None], len(heads), axis=-1)
        self.heads = torch.tensor(heads, device=device)
        needs = policy.needs
        self.peak = needs == "line_max"
        shape = (batch, len(heads), entries)
        if needs in ("line_mean", "line_max", "total"):
            self.seen = torch.zeros(shape, device=device)
        elif needs == "attention":
            self.window = min(policy.window, self.geometry.width)
            self.history = torch.zeros(self.window, *shape, device=device)
        self.query: Tensor | None = None  # (B, G, r, D), sum over the queries since the ranking

    def read(self, row: Tensor) -> None:
        """Follow a row `(4 + S, G)` of the table."""
        self.now = row[1:]

    def follow(self, upcoming: Tensor, slot: Tensor) -> None:
        """Write entries of steps to come, `(period, B, G)`, for `slot` `(B, G)` to be one of."""
        self.upcoming, self.slot = upcoming, slot

    @property
    def positions(self) -> Tensor:
        """`(B, G, R)`, the image position of the token in each slot; NO_VICTIM where none has
        come."""
        if self.noted < self.come:
            taken = self.places[..., self.noted - self.ranked : self.come - self.ranked]
            tokens = torch.arange(self.noted, self.come, device=taken.device)
            # A line's own tokens may be evicted too: then the last that came to a slot is there.
            self.recorded.scatter_reduce_(-1, taken, tokens.expand_as(taken), "amax")
            self.noted = self.come
        return self.recorded

    def advance(self, step: int, keys: Tensor, values: Tensor) -> None:
        """Go to image token `step`."""
        if step % self.every == 0:
            self._rank(step, keys, values)
        self.evicting = self.evicted = step >= self.capacity
        self.shortest = self.longest = self.prefix + min(step + 1, self.capacity)
        self.come = step + 1
        if self.policy.needs == "attention":
            self.seen = self.history[step % self.window].zero_()

    def observe(self, q: Tensor) -> None:
        """See the layer's queries `(B, H·r, D)` of the step."""
        if self.policy.needs == "line_query":
            q = q.unflatten(1, (self.geometry.heads, -1))[:, self.heads].float()
            if self.query is None:
                self.query = torch.zeros_like(q)
            self.query += q

    def _rank(self, step: int, keys: Tensor, values: Tensor) -> None:
        """Fix the places of tokens until the next ranking."""
        steps = range(step, min(step + self.every, self.geometry.n_tokens))
        n_evicted = max(0, steps.stop - max(step, self.capacity))
        residents = self.positions[..., : min(step, self.capacity)]
        victims = residents[..., :0]
        if n_evicted:
            in_raster_order = residents.argsort(-1)
            view = self._look(step, in_raster_order, keys, values)
            evictions = self.policy.rank_evictions(view, steps, n_evicted)
            victims = self._slots_of(evictions, in_raster_order)
        self._place(steps, victims)
        if self.query is not None:
            self.query.zero_()
        if self.seen is not None and self.policy.needs != "attention":  # which forgets by itself
            self.seen.mul_(self.policy.decay if self.policy.needs == "total" else 0)

    def _look(self, step: int, order: Tensor, keys: Tensor, values: Tensor) -> View:
        """What the policy sees of the slots `order` `(B, G, R)`, residents in raster order."""
        need, queries = self.policy.needs, min(step, self.every)
        entries, positions = order + self.prefix, self.positions.gather(-1, order)
        asked: dict[str, Tensor] = {}
        if need == "attention":
            before = range(max(0, step - self.window), step)
            rows = [self.history[query % self.window].gather(-1, entries) for query in before]
            known = [positions <= query for query in before]
            asked[need] = torch.stack(rows, dim=2) * torch.stack(known, dim=2)
        elif need == "line_query" and self.query is not None:
            asked[need] = self.query / queries
        elif need is not None and self.seen is not None:
            seen = self.seen.gather(-1, entries)
            asked[need] = seen / queries if need == "line_mean" else seen

        def read(buffer: Tensor) -> Tensor:
            index = entries[..., None].expand(-1, -1, -1, buffer.shape[-1])
            return buffer.gather(2, index).float()

        return View(
            step,
            self.geometry,
            self.capacity,
            positions,
            self.expectation,
            lambda: read(keys),
            lambda: read(values),
            **asked,
        )

    def _place(self, steps: range, victims: Tensor) -> None:
        """Give tokens what is free and then the places of victims `(B, G, ·)`, in this order."""
        last = max(min(steps.stop, self.capacity), steps.start)
        free = torch.arange(steps.start, last, device=victims.device)
        self.places = torch.cat([free.expand(*victims.shape[:2], -1), victims], dim=-1)
        self.ranked = steps.start
        rows = torch.arange(steps.start, steps.stop, device=victims.device) % len(self.upcoming)
        self.upcoming[rows] = self.places.permute(2, 0, 1) + self.prefix

    def _slots_of(self, evictions: Tensor, residents: Tensor) -> Tensor:
        """The slots of the victims, `(B, G, n_evicted)`: a line's own tokens fill what is free
        and then take their victims' places, in which they may be overwritten in turn."""
        resident, n_evicted = residents.shape[-1], evictions.shape[-1]
        free = torch.arange(resident, self.capacity, device=residents.device)
        first = torch.cat([residents, free.expand(*residents.shape[:2], -1)], dim=-1)
        # Whose place each takes, those of the first slots their own; doubled until nobody is left.
        own = torch.arange(self.capacity, device=residents.device).expand_as(first)
        place = torch.cat([own, evictions], dim=-1)
        for _ in range(n_evicted.bit_length()):
            place = place.gather(-1, place)
        return first.gather(-1, place[..., self.capacity :])

    def seek(self, step: int) -> None:
        """Go there as if all tokens before `step` had come."""
        newest = min(step, self.capacity)
        self.recorded.fill_(NO_VICTIM)
        tokens = torch.arange(step - newest, step, device=self.recorded.device)
        self.recorded[..., :newest] = tokens
        self.come = self.noted = step
        if step % self.every:
            until = min(step - step % self.every + self.every, self.geometry.n_tokens)
            n_evicted = max(0, until - max(step, self.capacity))
            own = torch.arange(self.capacity, device=tokens.device).expand_as(self.recorded)
            self._place(range(step, until), own[..., :n_evicted])  # the oldest come first


class Tables:
    """The tables of all groups side by side, so that one copy turns them all: on a GPU a copy for
    each would take longer than a layer's attention."""

    def __init__(self, slots: list[Slots], device: torch.device) -> None:
        _, rows, widths = zip(*(each.table.shape for each in slots), strict=True)
        padded = [
            np.pad(each.table, ((0, 0), (0, max(rows) - own), (0, 0)))
            for each, own in zip(slots, rows, strict=True)
        ]
        whole = np.ascontiguousarray(np.concatenate(padded, axis=-1))
        self.table = torch.tensor(whole, device=device)  # (N, 4 + S, ΣG), S the most of any group
        self.row = torch.zeros_like(self.table[0])
        parts = self.row.split(widths, dim=-1)
        for each, own, part in zip(slots, rows, parts, strict=True):
            each.read(part[:own])
        # What is ranked is known for a few steps, row by row of the batch: those take turns.
        ranked = [each for each in slots if isinstance(each, RankedSlots)]
        heads = [each.recorded.shape[1] for each in ranked]
        period = max((each.every for each in ranked), default=1)
        shape = (period, len(ranked[0].recorded) if ranked else 0, sum(heads))
        self.upcoming = torch.zeros(shape, dtype=torch.long, device=device)
        self.slot = torch.zeros_like(self.upcoming[0])
        theirs = zip(
            ranked, self.upcoming.split(heads, -1), self.slot.split(heads, -1), strict=True
        )
        for each_ranked, upcoming, slot in theirs:
            each_ranked.follow(upcoming, slot)

    def advance(self, step: int) -> None:
        """To image token `step`."""
        self.row.copy_(self.table[step])
        if self.slot.numel():
            self.slot.copy_(self.upcoming[step % len(self.upcoming)])
