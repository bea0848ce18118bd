"""The options of a policy at their best: one declared search, the same for every policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewlines.cache.spec import Cache, make_policy
from fewlines.metrics.likelihood import Likelihood


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried."""

    cache: Cache
    found: Likelihood

    @property
    def nll(self) -> float:
        """Nats/token, mean over the images."""
        return self.found.nll.mean().item()


def search_options(
    cache: Cache,
    options: Mapping[str, Sequence[Any]],
    trials: int,
    measure: Callable[[Sequence[Cache]], Sequence[Likelihood]],
) -> list[Trial]:
    """Search the options of a cache's policy one after another.

    It starts from the policy's defaults. All values of the first option are tried and the best is
    kept, then those of the next, and over again until a round changes nothing or the trials are
    spent. The order of `options` is the order of the search.

    Args:
        cache: the policy with its defaults, at a budget.
        options: the values of each option.
        trials: configurations that may be measured, the defaults included.
        measure: the likelihoods of several caches.

    Returns:
        Every configuration that was measured, in that order.

    Raises:
        FewlinesError: the policy has no such option, or it does not take a value.
    """
    tried: dict[str, Trial] = {}

    def try_all(several: Iterable[dict[str, Any]]) -> None:
        caches: dict[str, Cache] = {}
        for chosen in several:
            policy = make_policy(cache.policy.name, chosen)
            if str(policy) not in tried and len(tried) + len(caches) < trials:
                caches[str(policy)] = replace(cache, policy=policy)
        measured = measure([*caches.values()]) if caches else []
        for (name, each), found in zip(caches.items(), measured, strict=True):
            tried[name] = Trial(each, found)

    try_all([{}])
    while True:
        before = len(tried)
        for option, values in options.items():
            best = find_best(tried.values()).cache.policy
            now = {name: getattr(best, name) for name in options if hasattr(best, name)}
            try_all(now | {option: value} for value in values)
        if len(tried) == before:
            return list(tried.values())


def find_best(tried: Iterable[Trial]) -> Trial:
    """Find the trial of the least nats/token; of equal ones the first."""
    return min(tried, key=lambda trial: trial.nll)
