"""What a cache is to a user: policy, budget, merging, and the allocation over heads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fewlines.cache.allocation import Allocation, Total, get_allocation, list_allocations
from fewlines.cache.budget import Budget
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import (
    CalibratedPolicy,
    OraclePolicy,
    Policy,
    ScoringPolicy,
    StaticPolicy,
    list_policies,
)
from fewlines.calibration.data import Calibration
from fewlines.calibration.losses import SMALLEST
from fewlines.errors import FewlinesError, look_up
from fewlines.geometry import Geometry, Table
from fewlines.schema import check_fields


@dataclass(frozen=True)
class Cache:
    """A policy at a budget.

    Attributes:
        policy: picks the victims.
        budget: image tokens resident per layer and head, merge slots included; None keeps all.
        merge: a victim is merged into a merge slot, not dropped. The slot holds the mean key, the
            mean value and the number `n` of its victims and enters the softmax with the additive
            bias `log n` (after KeepKV, arXiv 2504.09936, and ZSMerge, arXiv 2503.10714).
        allocation: how the total is divided over layers and heads, the name of a file in
            `cache/allocations`; the same for every image, the total of `uniform` at most.
        calibration: where the model's heads look, for policies and allocations that go by it.

    Raises:
        FewlinesError: the parts do not go together.
    """

    policy: Policy
    budget: Budget | None = None
    merge: bool = False
    allocation: str = "uniform"
    calibration: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse parts that are wrong by themselves or do not go together."""
        check_fields(self, "cache")
        if self.budget is None and self.policy.name != "full":
            raise FewlinesError(f"cache: {self.policy} needs a budget, such as {{lines: 3}}")
        if self.policy.name == "full" and (self.budget is not None or self.merge):
            raise FewlinesError("cache: 'full' keeps every token; leave out budget and merge")
        self._allocation.check(self.policy, self.merge)

    @property
    def _allocation(self) -> Allocation:
        return get_allocation(self.allocation)

    @property
    def policy_text(self) -> str:
        """The policy as tables name it: `scheduled+merge+allocated`."""
        parts = [str(self.policy), "merge" if self.merge else "", self._allocation.label]
        return "+".join(filter(None, parts))

    @property
    def budget_text(self) -> str:
        """The budget as tables name it: `lines: 3`, or `all`."""
        return "all" if self.budget is None else str(self.budget)

    @property
    def slug(self) -> str:
        """The cache in file names: `streaming+merge-3lines`."""
        name = re.sub(r"[(,]", "-", re.sub(r"[=)]", "", self.policy_text))
        return name if self.budget is None else f"{name}-{self.budget.slug}"

    @property
    def requires(self) -> str:
        """What of a calibration it goes by: nothing, `attention`, `losses` or `band losses`."""
        by_policy = "attention" if self.policy.calibrated else ""
        return self._allocation.requires or by_policy

    def count_tokens(self, geometry: Geometry) -> int:
        """Count the image tokens that a head may hold, merge slots included, if all hold alike."""
        return geometry.n_tokens if self.budget is None else self.budget.tokens(geometry.grid)

    def plan(self, geometry: Geometry) -> EvictionPlan:
        """Plan the evictions for a model and an image size; the result is remembered.

        Raises:
            FewlinesError: the budget is too small for this grid, or a calibration is missing or of
                another model.
        """
        return _plan_once(self, geometry)

    def require_calibration(self, geometry: Geometry) -> Calibration:
        """Give the calibration.

        Raises:
            FewlinesError: there is none, or it is of another model or grid.
        """
        if self.calibration is None:
            raise FewlinesError(
                f"cache: {self.policy_text} needs a calibration of this model; "
                "'fewlines calibrate' writes one, --calibration names it"
            )
        self.calibration.check(geometry)
        return self.calibration

    def allocate(self, geometry: Geometry) -> tuple[Table, Table]:
        """Divide the budget: how many tokens each head may hold beside its merge slots, and how
        many of those it has, both `(L, H)`."""
        alike = np.full((geometry.layers, geometry.heads), self.count_tokens(geometry) - self.merge)
        total = int(alike.sum())
        if self.allocation == "uniform":
            return alike, np.full_like(alike, int(self.merge))
        if total < SMALLEST * alike.size:
            raise FewlinesError(f"cache: {self.slug} leaves less than {SMALLEST} tokens to a head")
        known = self.require_calibration(geometry) if self._allocation.requires else None
        return self._allocation.allocate(Total(self.policy, geometry, total, self.merge, known))

    def calibrated(self, path: Path | None) -> Cache:
        """Add the calibration in a file, if the cache goes by one and there is one."""
        if path is None or not self.requires:
            return self
        return replace(self, calibration=Calibration.load(path))


def make_plan(cache: Cache, geometry: Geometry) -> EvictionPlan:
    """Plan as `Cache.plan` does; neither the plan nor the calibration is remembered."""
    if cache.count_tokens(geometry) >= geometry.n_tokens:
        return EvictionPlan.full(geometry)
    capacity, merge_slots = cache.allocate(geometry)
    if capacity.min() < 1:
        raise FewlinesError(
            f"cache: {cache.slug} has no capacity for the token being decoded beside its merge "
            "slot; write a budget of at least 2 tokens"
        )
    policy = cache.policy
    if isinstance(policy, ScoringPolicy):
        calibration = cache.require_calibration(geometry) if policy.calibrated else None
        return EvictionPlan(
            geometry, capacity, merge_slots, scoring=policy, calibration=calibration
        )
    if isinstance(policy, OraclePolicy):
        return EvictionPlan(geometry, capacity, merge_slots, oracle=policy)
    if isinstance(policy, StaticPolicy):
        victims = policy.choose_victims(geometry, capacity)
    else:
        assert isinstance(policy, CalibratedPolicy)
        calibration = cache.require_calibration(geometry)
        victims = policy.choose_victims(geometry, capacity, calibration)
    return EvictionPlan(geometry, capacity, merge_slots, victims)


_plan_once = lru_cache(maxsize=32)(make_plan)


def make_cache(
    policy: str,
    *,
    lines: float | None = None,
    fraction: float | None = None,
    tokens: int | None = None,
    merge: bool = False,
    allocation: str = "uniform",
    calibration: str | Path | None = None,
    **options: Any,
) -> Cache:
    """Make a cache: `fewlines.cache("streaming", lines=3, sinks=4)`.

    Args:
        policy: the name of a file in `cache/policies`.
        lines: the budget in lines of the image; give one of `lines`, `fraction` and `tokens`.
        fraction: the budget as a share of the image.
        tokens: the budget in tokens.
        merge: merge victims into a merge slot, in place of dropping them.
        allocation: how the total is divided over heads, the name of a file in `cache/allocations`.
        calibration: a file that `fewlines calibrate` wrote.
        options: fields of the policy.

    Raises:
        FewlinesError: an unknown name, option or unit, or parts that do not go together.
    """
    amounts = {"lines": lines, "fraction": fraction, "tokens": tokens}
    given = [Budget.parse({unit: amount}) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        raise FewlinesError("cache: give one of lines, fraction and tokens, not several")
    made = Cache(make_policy(policy, options), given[0] if given else None, merge, allocation)
    return made.calibrated(Path(calibration) if calibration else None)


def make_policy(name: str, options: dict[str, Any]) -> Policy:
    """Make the policy of this name.

    Raises:
        FewlinesError: no such policy, or no such option; with those that exist.
    """
    made = look_up(name, list_policies(), "policy")
    try:
        return made(**options)
    except TypeError:
        options_of = fields(made)  # type: ignore[arg-type]
        known = ", ".join(option.name for option in options_of) or "none"
        raise FewlinesError(
            f"policy '{name}' does not take {', '.join(map(str, options))}; its options: {known}"
        ) from None


def stand_in(cache: Cache) -> Cache:
    """Give a cache that costs as much and needs no calibration of a model: it is victims and shares
    that a calibration decides, not how many entries there are."""
    if not cache.requires:
        return cache
    name = "line_ar" if isinstance(cache.policy, ScoringPolicy) else "streaming"
    return replace(cache, policy=make_policy(name, {}), allocation="uniform")


def parse_cache(name: str) -> Cache:
    """Parse the name of a cache whose policy has its default options, as `Cache.slug` writes it:
    `full`, `line_ar-3lines`, `scheduled+merge+allocated-21tokens`, `streaming-1of6`; a colon may
    stand before the budget.

    Raises:
        FewlinesError: it is no such name.
    """
    found = re.fullmatch(r"(\w+)((?:\+\w+)*)(?:[-:](?:([\d.]+)(lines|tokens)|(\d+)of(\d+)))?", name)
    if not found:
        raise FewlinesError(
            f"cache '{name}' is not one of full, line_ar-3lines, scheduled+merge-21tokens, "
            "streaming-1of6"
        )
    policy, labels, amount, unit, share, of = found.groups()
    written = {unit: amount} if unit else {"fraction": f"{share}/{of}"} if of else None
    allocations = {rule.label: rule.name for rule in list_allocations().values()}
    wanted = set(labels.split("+")) - {""}
    merge, wanted = "merge" in wanted, wanted - {"merge"}
    unknown = wanted - set(allocations)
    if unknown or len(wanted) > 1:
        known = ", ".join(["merge", *filter(None, allocations)])
        raise FewlinesError(f"cache '{name}': after a plus stands one of {known}")
    budget = Budget.parse(written) if written else None
    allocation = allocations[next(iter(wanted), "")]
    return Cache(make_policy(policy, {}), budget, merge, allocation)
