"""Likelihoods and divergences, against those worked out from logits."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import fewlines
from conftest import CACHES, GRID, images
from fewlines.decode.sampler import Sampler
from fewlines.metrics.likelihood import (
    compare_storages,
    forward_oracle,
    measure_likelihood,
    measure_likelihoods,
    name_interval,
    pair_interval,
    predict_by_steps,
)


def draws(model, count=6):
    labels = torch.arange(count) % 3
    return labels, fewlines.generate(model, labels, fewlines.cache("full"), seed=1)


def test_likelihood_under_the_full_cache_is_that_of_the_model(model):
    labels, codes = draws(model)
    found = measure_likelihood(model, labels, codes, fewlines.cache("full"), batch=4)
    logits = model.teacher_forced(labels, codes)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert found.nll.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert not found.kl.any()
    assert torch.equal(found.nll, found.nll_full)


def test_likelihoods_and_divergences_are_those_of_the_logits(model):
    """KL(full ‖ cache): what coding by the cache's distribution costs where full is the truth."""
    labels, codes = images(model)
    cache = fewlines.cache("lines", lines=1)
    found = measure_likelihood(model, labels, codes, cache, batch=2)
    full = model.teacher_forced(labels, codes).double().softmax(-1)
    under = model.teacher_forced(labels, codes, model.limit(cache)).double().softmax(-1)
    expected = (full * (full / under).log()).sum(-1)
    torch.testing.assert_close(found.kl.double(), expected, atol=1e-5, rtol=1e-4)
    backwards = (under * (under / full).log()).sum(-1)
    assert (found.kl.double() - backwards).abs().max() > 1e-3
    for nll, probabilities in ((found.nll, under), (found.nll_full, full)):
        of_codes = probabilities.gather(-1, codes[..., None]).squeeze(-1)
        torch.testing.assert_close(nll, -of_codes.log().mean(-1), atol=1e-5, rtol=1e-5)
    added = [-x.gather(-1, codes[..., None]).squeeze(-1).log() for x in (under, full)]
    torch.testing.assert_close(found.delta, added[0] - added[1], atol=1e-5, rtol=1e-4)
    for measured, by_hand in ((found.kl, expected), (found.delta, added[0] - added[1])):
        by_line = by_hand.unflatten(1, (4, 5)).mean((0, 2))
        torch.testing.assert_close(found.average_by_line(measured), by_line, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", CACHES[:4], ids=lambda cache: cache.slug)
def test_a_small_cache_costs_likelihood_and_kl_starts_where_it_first_evicts(model, cache):
    labels, codes = draws(model, count=12)
    found = measure_likelihood(model, labels, codes, cache, batch=5)
    whole = measure_likelihood(model, labels, codes, cache, batch=12)
    torch.testing.assert_close(found.nll, whole.nll, atol=1e-5, rtol=1e-5)
    capacity = cache.budget.tokens(GRID) - cache.merge
    assert found.kl[:, : capacity + 1].abs().max() < 1e-5  # nobody was evicted yet
    assert found.kl[:, capacity + 1 :].mean() > 1e-4
    assert found.kl.min() > -1e-5


def test_the_paired_interval_is_students():
    difference = torch.tensor([0.1, 0.3, 0.2, 0.5, -0.1], dtype=torch.float64)
    mean, low, high = pair_interval(difference)
    expected = stats.ttest_1samp(difference.numpy(), 0).confidence_interval(0.95)
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert pair_interval(torch.zeros(3)) == (0, 0, 0)


def test_a_completion_counts_what_is_completed_alone(model):
    labels, codes = images(model)
    cache = fewlines.cache("lines", lines=1)
    found = measure_likelihood(model, labels, codes, cache, batch=3, prompt=7)
    under = model.teacher_forced(labels, codes, model.limit(cache)).log_softmax(-1)
    of_codes = under.gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(found.nll.float(), -of_codes[:, 7:].mean(-1), atol=1e-5, rtol=1e-5)
    said = found.summarise()
    whole = measure_likelihood(model, labels, codes, cache, batch=3)
    assert said["kl"] == pytest.approx(whole.kl[:, 7:].mean().item(), rel=1e-5)
    by_line = whole.average_by_line(whole.kl).tolist()  # of five tokens each: the second is torn
    assert said["kl_by_line"] == [None, None, *map(pytest.approx, by_line[2:])]
    assert said["nll_delta_by_line"][:2] == [None, None]


@pytest.mark.parametrize("merge", [False, True])
def test_an_oracle_keeps_what_the_rest_of_this_image_looks_at(model, merge):
    """So it loses less than a window; with room for all it loses nothing."""
    labels, codes = images(model)
    oracle, window, whole = (
        fewlines.cache(name, lines=lines, merge=merge)
        for name, lines in (("oracle", 1), ("lines", 1), ("oracle", 4))
    )
    found, other, nothing = measure_likelihoods(model, labels, codes, [oracle, window, whole], 3)
    assert 1e-4 < found.kl.mean() < other.kl.mean()
    assert not nothing.kl.any()
    plan = oracle.plan(model.geometry)
    direct = forward_oracle(model, labels, codes, plan).log_softmax(-1)
    expected = -direct.gather(-1, codes[..., None]).squeeze(-1).mean(-1)
    torch.testing.assert_close(found.nll.float(), expected, atol=1e-5, rtol=1e-5)


def test_several_caches_are_measured_as_each_alone_and_progress_is_told(model):
    labels, codes = images(model)
    caches = [fewlines.cache("full"), fewlines.cache("lines", lines=1), CACHES[2]]
    told: list[int] = []
    together = measure_likelihoods(model, labels, codes, caches, batch=2, done=told.append)
    assert sum(told) == len(labels) * len(caches)
    for cache, found in zip(caches, together, strict=True):
        alone = measure_likelihood(model, labels, codes, cache, batch=2)
        assert torch.equal(found.nll, alone.nll)
        assert torch.equal(found.nll_full, alone.nll_full)
        assert torch.equal(found.kl, alone.kl)


def test_prediction_by_steps_is_that_of_the_parallel_forward(model):
    labels, codes = images(model)
    for cache in (fewlines.cache("full"), fewlines.cache("streaming", lines=1, merge=True)):
        found = predict_by_steps(model, labels, codes, cache)
        expected = model.teacher_forced(labels, codes, model.limit(cache))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_storages_are_compared_with_float32(model):
    labels, codes = images(model)
    same, rough = compare_storages(model, labels, codes, [torch.float32, torch.bfloat16])
    assert not same.nll_delta.any()
    assert rough.nll_delta.abs().min() > 1e-6
    assert (same.equal_tokens, same.equal_before) == (1.0, 1.0)
    full = fewlines.cache("full")

    def nll(storage):
        logits = predict_by_steps(model, labels, codes, full, storage).log_softmax(-1)
        return -logits.gather(-1, codes[..., None]).squeeze(-1).mean(-1)

    expected = nll(torch.bfloat16) - nll(torch.float32)
    torch.testing.assert_close(rough.nll_delta.float(), expected, atol=1e-5, rtol=1e-3)
    greedy = Sampler(temperature=0)
    fine, stored = (
        fewlines.generate(model, labels, full, sampler=greedy, storage=storage)
        for storage in (torch.float32, torch.bfloat16)
    )
    equal = fine == stored
    assert rough.equal_tokens == pytest.approx(equal.float().mean().item())
    before = [row.tolist().index(False) / 20 if not row.all() else 1.0 for row in equal]
    assert rough.equal_before == pytest.approx(sum(before) / len(before))


def test_an_interval_is_named_as_tables_name_it():
    found = name_interval("behind", torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))
    assert list(found) == ["behind", "behind_low", "behind_high"]
    assert found["behind"] == pytest.approx(0.2)
    assert found["behind_low"] < 0.2 < found["behind_high"]
