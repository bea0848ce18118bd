"""The search of a policy's options: what it tries, what it keeps, and when it stops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fewlines
from fewlines.errors import FewlinesError
from fewlines.metrics.search import find_best, search_options

START = fewlines.cache("rkv", lines=2)
OPTIONS = {"window": [2, 8, 4], "kernel": [3, 5], "share": [0.3, 0.5]}


def measure(caches):
    """Least at window 4, kernel 5, share 0.3; kernel 5 pays only where the share is small."""
    found = []
    for cache in caches:
        policy = cache.policy
        loss = abs(policy.window - 4) + 20 * abs(policy.share - 0.3)
        loss += abs(policy.kernel - (5 if policy.share == 0.3 else 3))
        found.append(SimpleNamespace(nll=torch.tensor([loss, loss])))
    return found


def test_options_are_searched_one_after_another_until_nothing_changes():
    tried = search_options(START, OPTIONS, 100, measure)
    names = [str(trial.cache.policy) for trial in tried]
    assert names == [
        "rkv",  # window 8, kernel 7, share 0.1
        "rkv(window=2)",
        "rkv(window=4)",
        "rkv(window=4,kernel=3)",
        "rkv(window=4,kernel=5)",
        "rkv(window=4,kernel=3,share=0.3)",
        "rkv(window=4,kernel=3,share=0.5)",
        "rkv(window=2,kernel=3,share=0.3)",
        "rkv(kernel=3,share=0.3)",
        "rkv(window=4,kernel=5,share=0.3)",
        "rkv(window=4,kernel=5,share=0.5)",
        "rkv(window=2,kernel=5,share=0.3)",
        "rkv(kernel=5,share=0.3)",
    ]
    best = find_best(tried)
    assert str(best.cache.policy) == "rkv(window=4,kernel=5,share=0.3)"
    assert best.nll == pytest.approx(0)
    assert {trial.cache.budget for trial in tried} == {START.budget}


@pytest.mark.parametrize("trials", [1, 2, 6])
def test_no_more_is_measured_than_the_trials_allow(trials):
    every = search_options(START, OPTIONS, 100, measure)
    few = search_options(START, OPTIONS, trials, measure)
    assert [str(trial.cache.policy) for trial in few] == [
        str(trial.cache.policy) for trial in every[:trials]
    ]


def test_a_policy_without_options_is_measured_once():
    cache = fewlines.cache("knorm", lines=1)
    tried = search_options(cache, {}, 32, lambda caches: [SimpleNamespace(nll=torch.ones(2))])
    assert [str(trial.cache.policy) for trial in tried] == ["knorm"]


def test_options_that_a_policy_does_not_have_are_refused():
    with pytest.raises(FewlinesError, match=r"rkv.*does not take.*sinks"):
        search_options(START, {"sinks": [4]}, 8, measure)
