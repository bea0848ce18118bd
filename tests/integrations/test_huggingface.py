"""The peer is the same model: equal logits, equal greedy tokens."""

from __future__ import annotations

import pytest
import torch

import fewlines
from conftest import GRID, tiny_transformer
from fewlines.decode.loop import decode
from fewlines.decode.sampler import Sampler
from fewlines.integrations.huggingface import LlamaSteps, generate_codes, make_llama

N = GRID[0] * GRID[1]
ENGINES = ["hf-dynamic", "hf-static", "hf-fewlines"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_generate_draws_the_greedy_tokens_of_the_full_cache(kv_heads, engine):
    model = tiny_transformer(kv_heads=kv_heads)
    llama = make_llama(model)
    labels = torch.tensor([0, 1, 2, 3])
    middle = torch.full((4, N), 0.5, dtype=torch.float64)
    cold = Sampler(temperature=1e-4)
    ours = decode(model, labels, middle, fewlines.cache("full"), cold)
    prefix = model.embed_labels(labels)
    steps = LlamaSteps(llama, 4, model.geometry, engine, 1, fewlines.cache("full"))
    theirs = generate_codes(llama, prefix, N, steps.make_cache(1 + N))
    assert torch.equal(ours, theirs)
    inputs = torch.cat([prefix, model.embed_codes(ours[:, :-1])], dim=1)
    logits = llama(inputs_embeds=inputs).logits
    expected = model.teacher_forced(labels, ours)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_are_timed_from_any_position(model, engine):
    few = engine == "hf-fewlines"
    cache = fewlines.cache("streaming", lines=2) if few else fewlines.cache("full")
    steps = LlamaSteps(make_llama(model), 2, model.geometry, engine, 2, cache)
    assert steps.seconds(0) > 0
    assert steps.seconds(N - 4) > 0
    assert steps.whole() > 0
