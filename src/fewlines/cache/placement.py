"""From a policy and a budget to slots: the one place where capacity is enforced.

Everything downstream reads a `Placement`: the buffer of the decode loop takes the slots, the
teacher-forced forward takes the step at which each token is evicted. They cannot drift apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fewlines.cache.budget import Budget
from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import (
    NOBODY,
    CalibratedPolicy,
    Expectation,
    HindsightPolicy,
    Policy,
    ScoringPolicy,
    StaticPolicy,
    registry,
)
from fewlines.cache.split import (
    SMALLEST,
    split_by_depth,
    split_by_joint_rank,
    split_by_loss,
    split_by_mass,
    split_by_reach,
    split_by_summaries,
)
from fewlines.errors import FewlinesError
from fewlines.files import digest

Split = Literal["uniform", "calibrated", "summaries", "mass", "pyramid", "headkv", "ada"]
SUFFIX = {
    "uniform": "",
    "calibrated": "+budgets",
    "summaries": "+summaries",
    "mass": "+mass",
    "pyramid": "+pyramid",
    "headkv": "+headkv",
    "ada": "+ada",
}


@dataclass(frozen=True)
class Cache:
    """What a cache is to a user: who goes, how many stay, and what becomes of the victims.

    Attributes:
        policy: picks the victims.
        budget: image tokens resident per layer and head, summary slots included; None keeps all.
        fold: a victim is folded into a summary slot, not dropped: the slot holds the mean key,
            the mean value and the number `n` of its victims and enters the softmax with the
            additive bias `log n` (after KeepKV 2504.09936 and ZSMerge 2503.10714).
        split: over layers and heads; `calibrated` gives each head what it was measured to lose
            least with, `summaries` several summary slots as well where that loses less, each of
            the columns of a band; `mass` what its expected attention is worth, `pyramid` gives
            early layers more (PyramidKV 2406.02069), `headkv` heads that look far (HeadKV
            2605.20600), `ada` those of a layer that look at most (Ada-KV 2407.11550); the same for
            every image, and `uniform`'s total at most.
        calibration: where the model's heads look, for policies that go by it.
    """

    policy: Policy
    budget: Budget | None = None
    fold: bool = False
    split: Split = "uniform"
    calibration: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.budget is None and self.policy.name != "full":
            raise FewlinesError(f"cache: {self.policy} needs a budget, such as {{lines: 3}}")
        if self.policy.name == "full" and (self.budget is not None or self.fold):
            raise FewlinesError("cache: 'full' keeps every token; leave out budget and fold")
        if self.split in ("calibrated", "summaries") and not (self.fold and self._is_calibrated):
            raise FewlinesError(
                f"cache: 'split: {self.split}' is measured with the schedule's victims folded; "
                f"{self.policy_text} can be split by mass, or as pyramid, headkv and ada do"
            )
        if self.split == "summaries" and isinstance(self.policy, ScoringPolicy):
            raise FewlinesError(
                f"cache: {self.policy} has one summary in each head; write 'split: calibrated'"
            )
        if self.split == "mass" and not isinstance(self.policy, CalibratedPolicy):
            raise FewlinesError(f"cache: {self.policy} has no schedule to weigh heads by")

    @property
    def policy_text(self) -> str:
        """As tables name it: `scheduled+fold`."""
        fold = "+fold" if self.fold else ""
        return f"{self.policy}{fold}{SUFFIX[self.split]}"

    @property
    def budget_text(self) -> str:
        return "all" if self.budget is None else str(self.budget)

    def tokens(self, geometry: Geometry) -> int:
        """Image tokens that a head may hold, summary slots included, if all hold alike."""
        return geometry.n_tokens if self.budget is None else self.budget.tokens(geometry.grid)

    @property
    def slug(self) -> str:
        """For file names: `streaming+fold-3lines`."""
        name = re.sub(r"[(,]", "-", re.sub(r"[=)]", "", self.policy_text))
        return name if self.budget is None else f"{name}-{self.budget.slug}"

    def place(self, geometry: Geometry) -> Placement:
        """The slots of this cache for a model and an image size, remembered."""
        return _place(self, geometry)

    def victims(self, geometry: Geometry, room: Table) -> Table:
        """The policy's victims, of a policy that knows them beforehand."""
        if isinstance(self.policy, StaticPolicy):
            return self.policy.victims(geometry, room)
        assert isinstance(self.policy, CalibratedPolicy)
        return self.policy.victims(geometry, room, self.require_calibration(geometry))

    def require_calibration(self, geometry: Geometry) -> Calibration:
        """The calibration; raises if there is none, or one of another model or grid."""
        if self.calibration is None:
            raise FewlinesError(
                f"cache: {self.policy} needs a calibration of this model; "
                "'fewlines calibrate' writes one, --calibration names it"
            )
        self.calibration.check(geometry)
        return self.calibration

    def shares(self, geometry: Geometry) -> tuple[Table, Table]:
        """Room for tokens and number of summaries of each head, both `(L, H)`."""
        shape = (geometry.layers, geometry.heads)
        room = np.full(shape, self.tokens(geometry) - self.fold)
        summaries = np.full(shape, int(self.fold))
        if self.split == "uniform":
            return room, summaries
        total = int(room.sum())
        if total < SMALLEST * room.size:
            raise FewlinesError(f"cache: {self.slug} leaves less than {SMALLEST} tokens to a head")
        if self.split == "pyramid":
            return split_by_depth(geometry, total), summaries
        calibration = self.require_calibration(geometry)
        if self.split == "summaries":
            return split_by_summaries(geometry, total, calibration)
        if self.split == "headkv":
            return split_by_reach(geometry, total, calibration), summaries
        if self.split == "ada":
            return split_by_joint_rank(geometry, total, calibration), summaries
        if self.split == "calibrated":
            return split_by_loss(geometry, total, calibration), summaries
        assert isinstance(self.policy, CalibratedPolicy)
        return split_by_mass(self.policy, geometry, total, calibration), summaries

    @property
    def needs_calibration(self) -> bool:
        return self.split in ("headkv", "ada") or self._is_calibrated

    @property
    def _is_calibrated(self) -> bool:
        return isinstance(self.policy, CalibratedPolicy | ScoringPolicy) and self.policy.calibrated

    def calibrated(self, path: Path | None) -> Cache:
        """The same cache with the calibration in a file, if it needs one and there is one."""
        if path is None or not self.needs_calibration:
            return self
        return replace(self, calibration=Calibration.load(path))


def make_placement(cache: Cache, geometry: Geometry) -> Placement:
    """As `Cache.place`, made anew and not remembered, nor the calibration with it."""
    n = geometry.n_tokens
    if cache.tokens(geometry) >= n:
        shape = (geometry.layers, geometry.heads)
        nobody = np.full((*shape, n), NOBODY)
        return Placement(geometry, np.full(shape, n), np.zeros(shape, int), nobody)
    room, summaries = cache.shares(geometry)
    if room.min() < 1:
        raise FewlinesError(
            f"cache: {cache.slug} leaves no room for the token being decoded beside its "
            f"summary slot; write a budget of at least 2 tokens"
        )
    if isinstance(cache.policy, ScoringPolicy):
        calibration = cache.require_calibration(geometry) if cache.policy.calibrated else None
        return Placement(geometry, room, summaries, scoring=cache.policy, calibration=calibration)
    if isinstance(cache.policy, HindsightPolicy):
        return Placement(geometry, room, summaries, hindsight=cache.policy)
    return Placement(geometry, room, summaries, cache.victims(geometry, room))


_place = lru_cache(maxsize=32)(make_placement)


def cache(
    policy: str,
    *,
    lines: float | None = None,
    fraction: float | None = None,
    tokens: int | None = None,
    fold: bool = False,
    split: Split = "uniform",
    calibration: str | Path | None = None,
    **options: Any,
) -> Cache:
    """A cache in a user's words: `cache("streaming", lines=3, sinks=4)`."""
    amounts = {"lines": lines, "fraction": fraction, "tokens": tokens}
    given = [Budget.parse({unit: amount}) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        raise FewlinesError("cache: give one of lines, fraction and tokens, not several")
    made = Cache(make_policy(policy, options), given[0] if given else None, fold, split)
    return made.calibrated(Path(calibration) if calibration else None)


def make_policy(name: str, options: dict[str, Any]) -> Policy:
    """The policy of this name; raises with the names or options that exist."""
    policies = registry()
    if name not in policies:
        raise FewlinesError(f"unknown policy '{name}'; there are {', '.join(policies)}")
    try:
        return policies[name](**options)
    except TypeError:
        options_of = fields(policies[name])  # type: ignore[arg-type]
        known = ", ".join(option.name for option in options_of) or "none"
        raise FewlinesError(
            f"policy '{name}' does not take {', '.join(options)}; its options: {known}"
        ) from None


@dataclass(frozen=True)
class Placement:
    """Where each image token is written and whom it overwrites, for every image alike.

    Attributes:
        room: `(L, H)`, slots for tokens.
        summaries: `(L, H)`, slots behind them for victims folded together, 0 where they are
            dropped; each of several takes the columns of a band.
        victims: `(L, H, N)`, the token evicted at each step, or `NOBODY`; None where a scoring
            policy picks them while the image is drawn.
        scoring: that policy; None where the victims are known.
        hindsight: a policy that needs the finished image; None for all that can be decoded with.
        calibration: what a scoring policy may go by.

    Raises:
        FewlinesError: the victims leave more tokens resident than there is room for, or name a
            token that is not resident. So no policy can hold more than its budget.
    """

    geometry: Geometry
    room: Table
    summaries: Table
    victims: Table | None = None
    scoring: ScoringPolicy | None = None
    hindsight: HindsightPolicy | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.victims is not None:
            _ = self.slots

    @property
    def known_victims(self) -> Table:
        """The victims, of a policy that knows them before the first token."""
        if self.hindsight is not None:
            raise FewlinesError(
                f"cache: {self.hindsight} looks at the finished image; "
                "its likelihood can be measured, nothing can be drawn with it"
            )
        if self.victims is None:
            raise FewlinesError(f"cache: {self.scoring} picks its victims while an image is drawn")
        return self.victims

    @property
    def fingerprint(self) -> str:
        """Differs where another token goes, or another thing becomes of it."""
        tables: list[npt.NDArray[Any]] = [self.room, self.summaries]
        tables += [] if self.victims is None else [self.victims]
        tables += [] if self.calibration is None else [self.calibration.attention]
        held = digest(torch.from_numpy(table) for table in tables)
        return f"{self.scoring or self.hindsight or 'static'}, {held}"

    @property
    def capacity(self) -> Table:
        """`(L, H)`, slots for image tokens, summary slots included."""
        return self.room + self.summaries

    @cached_property
    def slots(self) -> Table:
        """`(L, H, N)`, the slot that each image token is written to."""
        flat_victims = self.known_victims.reshape(-1, self.geometry.n_tokens)
        rows = np.column_stack([self.room.reshape(-1), flat_victims])
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
        layer, head, step = np.nonzero(victims != NOBODY)
        evicted[layer, head, victims[layer, head, step]] = step
        return evicted

    def kv_bytes(self, head_dim: int, storage: torch.dtype) -> int:
        """Bytes of one image's keys and values in the buffers: two vectors an entry, and, where 16
        bits are stored, the exact copies of the summaries."""
        summaries = int(self.summaries.sum()) if storage.itemsize < 4 else 0
        return 2 * head_dim * (self.kv_entries() * storage.itemsize + summaries * 4)

    def expectation(
        self, layer: int, heads: list[int], device: torch.device | str = "cpu"
    ) -> Expectation | None:
        """What calibration expects of some heads of a layer, for a policy that goes by it."""
        if self.calibration is None:
            return None
        both = (self.calibration.attention, self.calibration.future)
        attention, future = (
            torch.tensor(x[layer, heads], dtype=torch.float32, device=device) for x in both
        )
        return Expectation(attention, future)

    @property
    def is_full(self) -> bool:
        """Nothing is ever evicted."""
        return self.victims is not None and bool((self.victims == NOBODY).all())

    def kv_entries(self) -> int:
        """Entries held for one image in all layers and heads, the prefix included."""
        return int(self.capacity.sum()) + self.capacity.size * self.geometry.prefix


def _assign_slots(room: int, victims: Table) -> Table:
    """The slots `(N,)` of one head: a token takes its victim's, or else the next free one."""
    held: dict[int, int] = {}
    slots = np.empty_like(victims)
    for step, victim in enumerate(victims.tolist()):
        if victim == NOBODY:
            slot = len(held)
            if slot >= room:
                raise FewlinesError(f"policy keeps {slot + 1} tokens at step {step}, room: {room}")
        elif victim in held:
            slot = held.pop(victim)
        else:
            raise FewlinesError(f"policy evicts token {victim} at step {step}: not resident")
        held[step] = slots[step] = slot
    return slots
