from __future__ import annotations

import pytest
import torch

import fewlines
from conftest import CACHES, DECODED, GRID, calibrated
from fewlines.decode.loop import decode
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.errors import FewlinesError

N = GRID[0] * GRID[1]
LABELS = [index % 3 for index in range(11)]
GUIDED = Sampler(guidance=2.0, temperature=0.9, top_k=8, top_p=0.95)


@pytest.mark.parametrize("sampler", [Sampler(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("policy", DECODED)
@pytest.mark.parametrize("merge", [False, True])
def test_a_budget_of_the_image_gives_the_tokens_of_the_full_cache(
    model, capsys, policy, merge, sampler
):
    full = fewlines.generate(model, LABELS, fewlines.cache("full"), sampler=sampler)
    for budget in ({"lines": GRID[0]}, {"tokens": 500}, {"fraction": 1}):
        cache = calibrated(fewlines.cache(policy, **budget, merge=merge), model.shape.geometry)
        assert torch.equal(fewlines.generate(model, LABELS, cache, sampler=sampler), full)
        assert "this is the full cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cache", [fewlines.cache("full"), CACHES[0], CACHES[3]], ids=lambda c: c.slug
)
def test_the_batch_and_the_shard_do_not_change_an_image(model64, cache):
    """In float64: float32 sums differ in their last bit with the shape of a batch, and once in
    many thousand tokens that moves a draw."""
    whole = fewlines.generate(model64, LABELS, cache, seed=5, batch=64)
    for batch in (1, 7):
        assert torch.equal(fewlines.generate(model64, LABELS, cache, seed=5, batch=batch), whole)
    shard = fewlines.generate(model64, LABELS[4:], cache, seed=5, first=4)
    assert torch.equal(shard, whole[4:])
    assert not torch.equal(fewlines.generate(model64, LABELS, cache, seed=6), whole)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.slug)
def test_live_bytes_never_exceed_the_capacity_at_any_step(model, cache):
    geometry, head_dim = model.shape.geometry, model.shape.head_dim
    plan, budget = cache.plan(geometry), cache.budget.tokens(GRID)
    bound = (geometry.prefix + budget) * geometry.layers * geometry.heads * 2 * head_dim * 4 * 4
    seen = []

    def watch(step, state):
        seen.append(state.bytes)
        for groups, capacity in zip(state.buffers.layers, plan.entries, strict=True):
            for group in groups:
                assert (group.k.shape[2] <= geometry.prefix + capacity[group.heads]).all()

    decode(model, torch.tensor([0, 1, 2, 3]), draw_noise(0, range(4), N), cache, watch=watch)
    assert len(seen) == N
    assert max(seen) <= bound


def test_the_sampler_draws_in_proportion_and_respects_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    noise = draw_noise(0, range(1), 20_000)[0]

    def shares(sampler):
        return torch.bincount(sampler(logits, noise), minlength=4) / 20_000

    torch.testing.assert_close(shares(Sampler()), logits[0].exp(), atol=0.01, rtol=0)
    assert shares(Sampler(top_k=2))[2:].sum() == 0
    assert shares(Sampler(top_p=0.7))[2:].sum() == 0
    assert shares(Sampler(top_p=0.7))[1] > 0.3
    assert shares(Sampler(temperature=0.01))[0] == 1


def test_a_label_that_does_not_exist_is_refused(model):
    with pytest.raises(FewlinesError, match="labels must lie in 0 … 3"):
        fewlines.generate(model, [0, 4], fewlines.cache("full"))
