"""The plan of a cache: the one place where capacity is enforced.

Everything downstream reads an `EvictionPlan`: the buffer of the decode loop takes the slots, the
teacher-forced forward takes the step at which each token is evicted. They cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fewlines.cache.policy import NO_VICTIM, Expectation, OraclePolicy, ScoringPolicy
from fewlines.calibration.data import Calibration
from fewlines.errors import FewlinesError
from fewlines.files import digest
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class EvictionPlan:
    """Where each image token is written and which one it overwrites, for every image alike.

    Attributes:
        geometry: the image and the model.
        capacity: `(L, H)`, how many image tokens each head may hold.
        merge_slots: `(L, H)`, slots beside them for merged victims, 0 where victims are dropped;
            each of several takes the columns of a band.
        victims: `(L, H, N)`, the token evicted at each step, or `NO_VICTIM`; None where a scoring
            policy picks them while the image is drawn.
        scoring: that policy; None where the victims are known.
        oracle: a policy that is applied to a finished image; None for all that can be decoded with.
        calibration: what a scoring policy may go by.

    Raises:
        FewlinesError: the victims leave more tokens resident than the capacity, or name a
            token that is not resident. So no policy can hold more than its budget.
    """

    geometry: Geometry
    capacity: Table
    merge_slots: Table
    victims: Table | None = None
    scoring: ScoringPolicy | None = None
    oracle: OraclePolicy | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Simulate the victims, which refuses those that exceed the capacity."""
        n = self.geometry.n_tokens
        ranges = {"capacity": (1, n), "merge_slots": (0, n), "victims": (NO_VICTIM, n - 1)}
        for name, (least, most) in ranges.items():
            table = getattr(self, name)
            if table is not None and not least <= table.min() <= table.max() <= most:
                raise FewlinesError(f"cache: {name} must lie in {least} … {most}")
        if self.victims is not None:
            _ = self.slots

    @classmethod
    def full(cls, geometry: Geometry) -> EvictionPlan:
        """Plan no evictions."""
        shape, n = (geometry.layers, geometry.heads), geometry.n_tokens
        nothing = np.full((*shape, n), NO_VICTIM)
        return cls(geometry, np.full(shape, n), np.zeros(shape, int), nothing)

    @property
    def known_victims(self) -> Table:
        """The victims, of a policy that knows them before the first token."""
        if self.oracle is not None:
            raise FewlinesError(
                f"cache: {self.oracle} is applied to a finished image; "
                "its likelihood can be measured, nothing can be drawn with it"
            )
        if self.victims is None:
            raise FewlinesError(f"cache: {self.scoring} picks its victims while an image is drawn")
        return self.victims

    @property
    def fingerprint(self) -> str:
        """A text that differs where another token is evicted, or another thing becomes of it."""
        tables: list[npt.NDArray[Any]] = [self.capacity, self.merge_slots]
        tables += [] if self.victims is None else [self.victims]
        tables += [] if self.calibration is None else [self.calibration.attention]
        held = digest(torch.from_numpy(table) for table in tables)
        return f"{self.scoring or self.oracle or 'static'}, {held}"

    @property
    def entries(self) -> Table:
        """`(L, H)`, slots for image tokens, merge slots included."""
        return self.capacity + self.merge_slots

    @cached_property
    def slots(self) -> Table:
        """`(L, H, N)`, the slot that each image token is written to."""
        flat_victims = self.known_victims.reshape(-1, self.geometry.n_tokens)
        rows = np.column_stack([self.capacity.reshape(-1), flat_victims])
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        slots = np.stack([_assign_slots(int(row[0]), row[1:]) for row in distinct])
        return slots[inverse].reshape(self.known_victims.shape)

    @cached_property
    def evicted_at(self) -> Table:
        """`(L, H, N)`, the step at which each token is overwritten; `N` if it never is.

        A query at step `q` sees token `k` itself if and only if `k ≤ q < evicted_at[k]`.
        """
        n = self.geometry.n_tokens
        victims = self.known_victims
        evicted = np.full(victims.shape, n)
        layer, head, step = np.nonzero(victims != NO_VICTIM)
        evicted[layer, head, victims[layer, head, step]] = step
        return evicted

    def count_bytes(self, head_dim: int, storage: torch.dtype) -> int:
        """Count the bytes of one image's keys and values in the buffers: two vectors an entry, and,
        where 16 bits are stored, the exact copies of the merge slots.

        Args:
            head_dim: numbers of a key or a value.
            storage: what they are kept in.
        """
        merge_slots = int(self.merge_slots.sum()) if storage.itemsize < 4 else 0
        return 2 * head_dim * (self.count_entries() * storage.itemsize + merge_slots * 4)

    def get_expectation(
        self, layer: int, heads: list[int], device: torch.device | str = "cpu"
    ) -> Expectation | None:
        """Give what calibration expects of some heads of a layer, to a policy that goes by it."""
        if self.calibration is None:
            return None
        both = (self.calibration.attention, self.calibration.future)
        attention, future = (
            torch.tensor(x[layer, heads], dtype=torch.float32, device=device) for x in both
        )
        return Expectation(attention, future)

    @property
    def is_full(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.victims is not None and bool((self.victims == NO_VICTIM).all())

    def count_entries(self) -> int:
        """Count the entries held for one image in all layers and heads, the prefix included."""
        return int(self.entries.sum()) + self.entries.size * self.geometry.prefix


def _assign_slots(capacity: int, victims: Table) -> Table:
    """Assign the slots `(N,)` of one head: a token takes its victim's, or the next free one."""
    held: dict[int, int] = {}
    slots = np.empty_like(victims)
    for step, victim in enumerate(victims.tolist()):
        if victim == NO_VICTIM:
            slot = len(held)
            if slot >= capacity:
                raise FewlinesError(
                    f"policy keeps {slot + 1} tokens at step {step}, capacity {capacity}"
                )
        elif victim in held:
            slot = held.pop(victim)
        else:
            raise FewlinesError(f"policy evicts token {victim} at step {step}: not resident")
        held[step] = slots[step] = slot
    return slots
