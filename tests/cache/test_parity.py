"""The fast paths against slow, plainly written ones, for every policy and budget."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch

import fewlines
from conftest import CACHES, DECODED, GRID, calibrated, images, step_by_step, tiny_transformer
from fewlines.cache.buffer import BoundedCache, torch_step
from fewlines.cache.geometry import Geometry
from fewlines.cache.line_parallel import attention_under
from fewlines.cache.placement import Cache, Placement
from fewlines.cache.policy import NOBODY, ForesightPolicy, comparable
from fewlines.cache.teacher import TeacherForced
from fewlines.errors import FewlinesError
from fewlines.generate.sampler import Sampler
from fewlines.measure.attention import attention_of
from fewlines.measure.likelihood import in_hindsight

N = GRID[0] * GRID[1]


class SlowAttention:
    """The full-cache model with an explicit list of what each query sees, one query at a time."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def __call__(self, layer, q, k, v):
        out = torch.empty_like(q)
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        for row, head in itertools.product(range(len(q)), range(heads)):
            queries = q[row, head * group : (head + 1) * group]  # (r, T, D)
            out[row, head * group : (head + 1) * group] = self.one_head(
                layer, head, queries, k[row, head], v[row, head]
            )
        return out

    def one_head(self, layer, head, q, k, v):
        geometry, scoring = self.placement.geometry, self.placement.scoring
        P, out, kv = geometry.prefix, torch.empty_like(q), torch.stack([k, v])
        summaries = int(self.placement.summaries[layer, head])
        room = int(self.placement.room[layer, head])
        resident: list[int] = []
        folded: list[list[int]] = [[] for _ in range(summaries)]
        worth: dict[tuple[int, int], float] = {}  # of a token at a step
        probabilities = torch.zeros(q.shape[1], k.shape[0])  # (query, key), mean over the group
        for position in range(q.shape[1]):
            step = position - P
            if step >= 0:
                every = scoring.interval(geometry, room) if scoring else 1
                if scoring and step % every == 0:
                    worth = self.judged(
                        layer, head, step, every, resident, q, k, probabilities[P:, P:]
                    )
                if scoring:
                    victim = NOBODY
                    if len(resident) == room:
                        victim = min(resident, key=lambda token: (worth[step, token], token))
                else:
                    victim = self.placement.victims[layer, head, step]
                if victim != NOBODY:
                    resident.remove(victim)
                    if summaries:
                        folded[victim % geometry.width * summaries // geometry.width].append(victim)
                resident.append(step)
            rows = torch.tensor([*range(min(position + 1, P)), *(P + token for token in resident)])
            held, bias = kv[:, rows], torch.zeros(len(rows), dtype=q.dtype)  # (2, C, D)
            for band in filter(None, folded):
                gone = kv[:, torch.tensor(band) + P]
                held = torch.cat([held, gone.mean(1, keepdim=True)], 1)
                bias = torch.cat([bias, torch.tensor([math.log(len(band))], dtype=q.dtype)])
            keys, values = held
            weights = (q[:, position] @ keys.T / q.shape[-1] ** 0.5 + bias).softmax(-1)
            out[:, position] = weights @ values
            probabilities[position, rows] = weights[:, : len(rows)].mean(0).float()
        return out

    def judged(self, layer, head, step, every, resident, q, k, probabilities):
        """What each token is worth at each step until the policy is asked again."""
        if not resident:
            return {}
        geometry, policy = self.placement.geometry, self.placement.scoring
        P, window = geometry.prefix, min(policy.window, geometry.width)
        aged = policy.decay ** (step // every - 1 - torch.arange(step) // every)
        line = probabilities[step - every : step, resident][None, None]
        view = SimpleNamespace(
            step=step,
            geometry=geometry,
            positions=torch.tensor(resident)[None, None],
            keys=k[[P + token for token in resident]][None, None].float(),
            line_mean=line.mean(2),
            line_max=line.amax(2),
            line_query=q[:, P + step - every : P + step].mean(1)[None, None].float(),
            attention=probabilities[max(0, step - window) : step, resident][None, None],
            total=(aged[:, None] * probabilities[:step, resident]).sum(0)[None, None],
            expectation=self.placement.expectation(layer, [head]),
        )
        steps = range(step, min(step + every, geometry.n_tokens))
        if isinstance(policy, ForesightPolicy):
            table = comparable(policy.foresee(view, steps))[0, 0]  # (S, R + S)
        else:
            own = torch.full((len(steps),), torch.inf)
            table = torch.cat([comparable(policy.score(view))[0, 0], own]).expand(len(steps), -1)
        return {
            (now, token): float(table[row, column])
            for row, now in enumerate(steps)
            for column, token in enumerate([*resident, *steps])
        }


def name(value: object) -> str:
    return value.slug if isinstance(value, Cache) else str(value)


@pytest.mark.parametrize("cache", CACHES, ids=name)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_and_the_parallel_forward_agree_with_the_slow_model(cache, kv_heads):
    model = tiny_transformer(kv_heads=kv_heads)
    labels, codes = images(model, batch=2)
    geometry = model.shape.geometry
    placement = calibrated(cache, geometry).place(geometry)
    slow = model.teacher_forced(labels, codes, SlowAttention(placement))
    parallel = model.teacher_forced(labels, codes, attention_under(placement))
    torch.testing.assert_close(parallel, slow, atol=1e-4, rtol=1e-4)
    buffers = BoundedCache(placement, len(labels), model.shape.head_dim)
    decoded = step_by_step(model, labels, codes, buffers)
    torch.testing.assert_close(decoded, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["lean", "stock"])
def test_both_full_caches_agree_with_plain_causal_attention(model, engine):
    labels, codes = images(model)
    placement = fewlines.cache("full").place(model.shape.geometry)
    buffers = BoundedCache(placement, len(labels), model.shape.head_dim, engine=engine)
    decoded = step_by_step(model, labels, codes, buffers)
    expected = model.teacher_forced(labels, codes)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


def attention_inputs(geometry: Geometry, query_heads: int):
    generator = torch.Generator().manual_seed(2)
    positions = geometry.prefix + geometry.n_tokens - 1

    def draw(heads):
        return torch.randn(2, heads, positions, 8, generator=generator, dtype=torch.float64)

    return draw(query_heads), draw(geometry.heads), draw(geometry.heads)


def decode_attention(placement: Placement, q, k, v) -> torch.Tensor:
    """Layer 0 of the decode loop over given queries, keys and values."""
    P = placement.geometry.prefix
    buffers = BoundedCache(placement, len(q), q.shape[-1], torch.float64)
    out = [buffers(0, q[:, :, :P], k[:, :, :P], v[:, :, :P])]
    for position in range(P, q.shape[2]):
        now = slice(position, position + 1)
        buffers.turn(position - P)
        out.append(buffers(0, q[:, :, now], k[:, :, now], v[:, :, now]))
    return torch.cat(out, 2)


@pytest.mark.parametrize("cache", CACHES, ids=name)
def test_a_prefix_longer_than_one_is_kept_whole(cache):
    geometry = Geometry(GRID, prefix=6, layers=1, heads=2)
    q, k, v = attention_inputs(geometry, query_heads=4)
    placement = calibrated(cache, geometry).place(geometry)
    slow = SlowAttention(placement)(0, q, k, v)
    torch.testing.assert_close(decode_attention(placement, q, k, v), slow)
    if placement.scoring is None:
        torch.testing.assert_close(TeacherForced(placement, torch.float64)(0, q, k, v), slow)


@pytest.mark.parametrize("summaries", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 1, 1, 5], [2, 0, 1, 0]])
def test_heads_of_different_capacity_and_victims(summaries):
    """What a calibrated schedule asks of the buffer: every head goes its own way."""
    geometry = Geometry(GRID, prefix=2, layers=1, heads=4)
    room = np.array([[5, 9, 5, N]]) - summaries
    random = np.random.default_rng(0)
    victims = np.full((1, 4, N), NOBODY)
    for head in range(4):
        resident: list[int] = []
        for step in range(N):
            early = head == 1 and step == 3  # a policy may evict before it is full
            if len(resident) == room[0, head] or early:
                victims[0, head, step] = resident.pop(random.integers(len(resident)))
            resident.append(step)
    placement = Placement(geometry, room, np.array([summaries]), victims)
    q, k, v = attention_inputs(geometry, query_heads=8)
    slow = SlowAttention(placement)(0, q, k, v)
    torch.testing.assert_close(decode_attention(placement, q, k, v), slow)
    torch.testing.assert_close(TeacherForced(placement, torch.float64)(0, q, k, v), slow)
    assert BoundedCache(placement, 3, 8).bytes == placement.kv_entries() * 3 * 8 * 4 * 2


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("budget", [{"lines": 1}, {"lines": 2}, {"tokens": 7}])
def test_the_oracle_evicts_what_the_rest_of_the_image_looks_at_least(budget, kv_heads, fold):
    """Image by image the slow model with the victims that Belady's rule finds in its attention."""
    model = tiny_transformer(kv_heads=kv_heads)
    labels, codes = images(model)
    placement = fewlines.cache("oracle", fold=fold, **budget).place(model.shape.geometry)
    fast = in_hindsight(model, labels, codes, placement)
    for row in range(len(labels)):
        alone = (labels[row : row + 1], codes[row : row + 1])
        seen = attention_of(model, *alone)
        victims = np.full((model.shape.layers, kv_heads, N), NOBODY)
        for layer, head in itertools.product(range(model.shape.layers), range(kv_heads)):
            resident: list[int] = []
            for step in range(N):
                if len(resident) == placement.room[layer, head]:
                    worth = {k: float(seen[layer][0, head, step:, k].sum()) for k in resident}
                    victims[layer, head, step] = min(resident, key=worth.__getitem__)
                    resident.remove(victims[layer, head, step])
                resident.append(step)
        known = replace(placement, victims=victims, hindsight=None)
        slow = model.teacher_forced(*alone, SlowAttention(known))
        torch.testing.assert_close(fast[row : row + 1], slow, atol=1e-4, rtol=1e-4)


def test_nothing_can_be_drawn_with_the_oracle(model):
    with pytest.raises(FewlinesError, match="looks at the finished image"):
        fewlines.generate(model, [0], fewlines.cache("oracle", lines=1))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("policy", DECODED)
def test_completion_with_guidance_draws_what_the_slow_model_finds_likeliest(policy, fold):
    """The first line and a half given; conditional and unconditional rows each have their cache."""
    model = tiny_transformer()
    labels, codes = images(model, batch=2)
    geometry = model.shape.geometry
    cache = calibrated(fewlines.cache(policy, lines=2, fold=fold), geometry)
    sampler, given = Sampler(top_k=1, guidance=1.5), codes[:, :8]
    drawn = fewlines.generate(model, labels, cache, sampler=sampler, given=given)
    assert torch.equal(drawn[:, :8], given)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])
    attend = SlowAttention(cache.place(geometry))
    logits = model.teacher_forced(both, torch.cat([drawn, drawn]), attend)
    assert torch.equal(sampler.guide(logits).argmax(-1)[:, 8:], drawn[:, 8:])


KERNEL_CACHES = [
    ("full", {}),
    ("streaming", {"lines": 2, "sinks": 2}),
    ("random", {"lines": 2}),
    ("random", {"tokens": 7, "fold": True}),
    ("linear", {"lines": 1.6, "anchor": 1}),
    ("h2o", {"lines": 2, "fold": True}),
    ("scheduled", {"lines": 2, "fold": True, "split": "summaries"}),
]


@pytest.mark.parametrize(
    ("storage", "tolerance"),  # a last bit of a sum may round a stored number the other way
    [(torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize(("policy", "options"), KERNEL_CACHES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_compiled_kernel_and_torch_agree(
    monkeypatch, policy, options, kv_heads, storage, tolerance
):
    """In whatever keys and values are stored: arithmetic is float32 on both sides."""
    model = tiny_transformer(kv_heads=kv_heads)
    labels, codes = images(model)
    geometry = model.shape.geometry
    placement = calibrated(fewlines.cache(policy, **options), geometry).place(geometry)

    def logits():
        buffers = BoundedCache(placement, len(labels), model.shape.head_dim, storage)
        return step_by_step(model, labels, codes, buffers)

    compiled = logits()
    monkeypatch.setattr(sys.modules[BoundedCache.__module__], "compiled_step", torch_step)
    by_torch = logits()
    assert not torch.equal(compiled, by_torch)  # two implementations, not one
    torch.testing.assert_close(compiled, by_torch, atol=tolerance, rtol=tolerance)


def test_the_kernel_keeps_to_torchs_threads(model):
    placement = fewlines.cache("full").place(model.shape.geometry)
    before = torch.get_num_threads()
    for threads in (2, 1):
        torch.set_num_threads(threads)
        BoundedCache(placement, 1, model.shape.head_dim)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(before)
