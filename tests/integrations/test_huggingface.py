"""The peer is the same model: equal logits, equal greedy tokens."""

from __future__ import annotations

import pytest
import torch

import fewlines
from conftest import GRID, tiny_transformer
from fewlines.decode.loop import decode
from fewlines.decode.sampler import Sampler
from fewlines.integrations.huggingface import LlamaSteps, generate_codes, make_cache, make_llama

N = GRID[0] * GRID[1]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_generate_draws_the_greedy_tokens_of_the_full_cache(kv_heads, static):
    model = tiny_transformer(kv_heads=kv_heads)
    llama = make_llama(model)
    labels = torch.tensor([0, 1, 2, 3])
    middle = torch.full((4, N), 0.5, dtype=torch.float64)
    cold = Sampler(temperature=1e-4)
    ours = decode(model, labels, middle, fewlines.cache("full"), cold)
    prefix = model.embed_labels(labels)
    theirs = generate_codes(llama, prefix, N, make_cache(llama, 1 + N, static))
    assert torch.equal(ours, theirs)
    inputs = torch.cat([prefix, model.embed_codes(ours[:, :-1])], dim=1)
    logits = llama(inputs_embeds=inputs).logits
    expected = model.teacher_forced(labels, ours)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_steps_are_timed_from_any_position(model, static):
    steps = LlamaSteps(make_llama(model), 2, model.shape.geometry, static, steps=2)
    assert steps.seconds(0) > 0
    assert steps.seconds(N - 4) > 0
    assert steps.whole() > 0
