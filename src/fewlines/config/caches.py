"""Lines of `caches`, in an experiment and wherever else caches are listed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from fewlines.cache.budget import Budget
from fewlines.cache.policy import OraclePolicy
from fewlines.cache.spec import Cache, make_policy, parse_cache
from fewlines.config.products import multiply, multiply_budgets, multiply_line
from fewlines.errors import FewlinesError
from fewlines.schema import Section

Measure = Literal["likelihood", "samples", "all"]
DEFAULT_CACHES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"policy": ["lines", "line_ar"], "budget": {"lines": 3}},
    {"policy": "line_ar", "budget": {"lines": 3}, "merge": True},
    {"policy": "streaming", "budget": {"lines": 3}, "measure": "samples"},
    {"policy": "scheduled", "budget": {"lines": [3, 2]}, "merge": True},
    {
        "policy": ["lines", "streaming", "line_ar"],
        "budget": {"lines": 2},
        "measure": "likelihood",
    },
    {
        "policy": "scheduled",
        "budget": {"lines": [3, 2, 1]},
        "merge": True,
        "allocation": "calibrated",
        "measure": "likelihood",
    },
]


def _check_cache(name: str) -> str:
    """As tables' file names write it, of names that need not be listed; those with options are
    checked against the list."""
    if "-" in name.split("+")[0] and not name.split("-")[1][:1].isdigit():
        return name
    try:
        cache = parse_cache(name)
    except FewlinesError as error:
        raise ValueError(str(error)) from None
    if isinstance(cache.policy, OraclePolicy):
        raise ValueError(
            f"{cache.policy.name} is applied to a finished image: nothing is drawn by it"
        )
    return cache.slug


CacheName = Annotated[str, AfterValidator(_check_cache)]


def _read_budget(written: object) -> Budget | None:
    if written is None or isinstance(written, Budget):
        return written
    try:
        return Budget.parse(written)
    except FewlinesError as error:
        raise ValueError(str(error)) from None


def _write_budget(budget: Budget | None) -> dict[str, str] | None:
    return None if budget is None else {budget.unit: str(budget.amount)}


Budgeted = Annotated[Any, BeforeValidator(_read_budget), PlainSerializer(_write_budget)]


class CacheSettings(Section):
    """One line of `caches`: `{policy: lines, budget: {lines: 3}}`. Lists multiply: `{policy:
    [lines, streaming], budget: {lines: [3, 2]}}` are four caches."""

    policy: str = Field(description="a file of src/fewlines/cache/policies, by its name")
    budget: Budgeted = Field(
        None, description="`{lines: 3}`, `{fraction: 1/6}` or `{tokens: 21}`; null for `full` alone"
    )
    merge: bool = Field(False, description="victims are merged into a merge slot, not dropped")
    allocation: str = Field(
        "uniform",
        description="of the total over layers and heads, a file of src/fewlines/cache/allocations",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="fields of the policy")
    measure: Measure = Field(
        "all",
        description="likelihood: no images are drawn and no time is taken, for a quick rank; "
        "samples: images are drawn, no time is taken",
    )

    @model_validator(mode="after")
    def _buildable(self) -> CacheSettings:
        try:
            policy = self.build().policy
        except FewlinesError as error:
            raise ValueError(str(error)) from None
        if isinstance(policy, OraclePolicy) and self.measure != "likelihood":
            raise ValueError(f"{policy.name} draws nothing; write measure: likelihood")
        return self

    def build(self) -> Cache:
        """Build the cache."""
        policy = make_policy(self.policy, self.options)
        return Cache(policy, self.budget, self.merge, self.allocation)


SeveralCaches = Annotated[tuple[CacheSettings, ...], BeforeValidator(multiply)]


SeveralBudgets = Annotated[tuple[Budgeted, ...], BeforeValidator(multiply_budgets)]


def list_caches(lines: object) -> object:
    """Each cache once, `full` among them; a later line replaces an earlier one of the same
    cache. Where one is wrong, one for each line: errors then count lines as the user does."""
    if not isinstance(lines, list | tuple) or not lines:
        return lines
    several = [[(_get_slug(each), each) for each in multiply_line(line)] for line in lines]
    if any(slug is None for line in several for slug, _ in line):
        return [min(line, key=lambda named: named[0] is not None)[1] for line in several]
    found: dict[str | None, object] = {}
    for slug, each in (named for line in several for named in line):
        if found.get(slug) == each:
            raise ValueError(f"{slug} is listed more than once")
        found[slug] = each
    return list(({"full": {"policy": "full"}} | found).values())


def _get_slug(line: object) -> str | None:
    """None of a line that cannot be used: what is wrong with it is said when it is validated."""
    try:
        return CacheSettings.model_validate(line).build().slug
    except ValueError:
        return None
