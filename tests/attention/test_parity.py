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
import torch.nn.functional as F

import fewlines
from conftest import CACHES, DECODED, GRID, calibrated, images, step_by_step, tiny_transformer
from fewlines.attention.buffer import BoundedCache, torch_step
from fewlines.attention.line_parallel import attend_under
from fewlines.attention.teacher_forced import TeacherForced
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import NO_VICTIM, LookaheadPolicy, comparable
from fewlines.cache.spec import Cache
from fewlines.calibration.capture import capture_attention
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry
from fewlines.metrics.likelihood import forward_oracle

N = GRID[0] * GRID[1]


class SlowAttention:
    """The full-cache model with an explicit list of what each query sees, one query at a time."""

    def __init__(self, plan: EvictionPlan) -> None:
        self.plan = plan

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
        geometry, scoring = self.plan.geometry, self.plan.scoring
        P, out, kv = geometry.prefix, torch.empty_like(q), torch.stack([k, v])
        merge_slots = int(self.plan.merge_slots[layer, head])
        capacity = int(self.plan.capacity[layer, head])
        resident: list[int] = []
        merged: list[list[int]] = [[] for _ in range(merge_slots)]
        score: dict[tuple[int, int], float] = {}  # of a token at a step
        probabilities = torch.zeros(q.shape[1], k.shape[0])  # (query, key), mean over the group
        for position in range(q.shape[1]):
            step = position - P
            if step >= 0:
                every = scoring.interval(geometry, capacity) if scoring else 1
                if scoring and step % every == 0:
                    score = self.judged(
                        layer, head, step, every, resident, q, k, v, probabilities[P:, P:]
                    )
                if scoring:
                    victim = NO_VICTIM
                    if len(resident) == capacity:
                        victim = min(resident, key=lambda token: (score[step, token], token))
                else:
                    victim = self.plan.victims[layer, head, step]
                if victim != NO_VICTIM:
                    resident.remove(victim)
                    if merge_slots:
                        merged[victim % geometry.width * merge_slots // geometry.width].append(
                            victim
                        )
                resident.append(step)
            rows = torch.tensor([*range(min(position + 1, P)), *(P + token for token in resident)])
            held, bias = kv[:, rows], torch.zeros(len(rows), dtype=q.dtype)  # (2, C, D)
            for band in filter(None, merged):
                gone = kv[:, torch.tensor(band) + P]
                held = torch.cat([held, gone.mean(1, keepdim=True)], 1)
                bias = torch.cat([bias, torch.tensor([math.log(len(band))], dtype=q.dtype)])
            keys, values = held
            weights = (q[:, position] @ keys.T / q.shape[-1] ** 0.5 + bias).softmax(-1)
            out[:, position] = weights @ values
            probabilities[position, rows] = weights[:, : len(rows)].mean(0).float()
        return out

    def judged(self, layer, head, step, every, resident, q, k, v, probabilities):
        """What each token is score at each step until the policy is asked again."""
        if not resident:
            return {}
        geometry, policy = self.plan.geometry, self.plan.scoring
        P, window = geometry.prefix, min(policy.window, geometry.width)
        aged = policy.decay ** (step // every - 1 - torch.arange(step) // every)
        line = probabilities[step - every : step, resident][None, None]
        view = SimpleNamespace(
            step=step,
            geometry=geometry,
            capacity=int(self.plan.capacity[layer, head]),
            positions=torch.tensor(resident)[None, None],
            keys=k[[P + token for token in resident]][None, None].float(),
            values=v[[P + token for token in resident]][None, None].float(),
            line_mean=line.mean(2),
            line_max=line.amax(2),
            line_query=q[:, P + step - every : P + step].mean(1)[None, None].float(),
            attention=probabilities[max(0, step - window) : step, resident][None, None],
            total=(aged[:, None] * probabilities[:step, resident]).sum(0)[None, None],
            expectation=self.plan.get_expectation(layer, [head]),
        )
        steps = range(step, min(step + every, geometry.n_tokens))
        if isinstance(policy, LookaheadPolicy):
            table = comparable(policy.score_ahead(view, steps))[0, 0]  # (S, R + S)
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
    plan = calibrated(cache, geometry).plan(geometry)
    slow = model.teacher_forced(labels, codes, SlowAttention(plan))
    parallel = model.teacher_forced(labels, codes, attend_under(plan))
    torch.testing.assert_close(parallel, slow, atol=1e-4, rtol=1e-4)
    buffers = BoundedCache(plan, len(labels), model.shape.head_dim)
    decoded = step_by_step(model, labels, codes, buffers)
    torch.testing.assert_close(decoded, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["lean", "stock"])
def test_both_full_caches_agree_with_plain_causal_attention(model, engine):
    labels, codes = images(model)
    plan = fewlines.cache("full").plan(model.shape.geometry)
    buffers = BoundedCache(plan, len(labels), model.shape.head_dim, engine=engine)
    decoded = step_by_step(model, labels, codes, buffers)
    expected = model.teacher_forced(labels, codes)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


def attention_inputs(geometry: Geometry, query_heads: int):
    generator = torch.Generator().manual_seed(2)
    positions = geometry.prefix + geometry.n_tokens - 1

    def draw(heads):
        return torch.randn(2, heads, positions, 8, generator=generator, dtype=torch.float64)

    return draw(query_heads), draw(geometry.heads), draw(geometry.heads)


def decode_attention(plan: EvictionPlan, q, k, v) -> torch.Tensor:
    """Layer 0 of the decode loop over given queries, keys and values."""
    P = plan.geometry.prefix
    buffers = BoundedCache(plan, len(q), q.shape[-1], torch.float64)
    out = [buffers(0, q[:, :, :P], k[:, :, :P], v[:, :, :P])]
    for position in range(P, q.shape[2]):
        now = slice(position, position + 1)
        buffers.advance(position - P)
        out.append(buffers(0, q[:, :, now], k[:, :, now], v[:, :, now]))
    return torch.cat(out, 2)


@pytest.mark.parametrize("cache", CACHES, ids=name)
def test_a_prefix_longer_than_one_is_kept_whole(cache):
    geometry = Geometry(GRID, prefix=6, layers=1, heads=2)
    q, k, v = attention_inputs(geometry, query_heads=4)
    plan = calibrated(cache, geometry).plan(geometry)
    slow = SlowAttention(plan)(0, q, k, v)
    torch.testing.assert_close(decode_attention(plan, q, k, v), slow)
    if plan.scoring is None:
        torch.testing.assert_close(TeacherForced(plan, torch.float64)(0, q, k, v), slow)


@pytest.mark.parametrize("merge_slots", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 1, 1, 5], [2, 0, 1, 0]])
def test_heads_of_different_capacity_and_victims(merge_slots):
    """What a calibrated schedule asks of the buffer: every head goes its own way."""
    geometry = Geometry(GRID, prefix=2, layers=1, heads=4)
    capacity = np.array([[5, 9, 5, N]]) - merge_slots
    random = np.random.default_rng(0)
    victims = np.full((1, 4, N), NO_VICTIM)
    for head in range(4):
        resident: list[int] = []
        for step in range(N):
            early = head == 1 and step == 3  # a policy may evict before it is full
            if len(resident) == capacity[0, head] or early:
                victims[0, head, step] = resident.pop(random.integers(len(resident)))
            resident.append(step)
    plan = EvictionPlan(geometry, capacity, np.array([merge_slots]), victims)
    q, k, v = attention_inputs(geometry, query_heads=8)
    slow = SlowAttention(plan)(0, q, k, v)
    torch.testing.assert_close(decode_attention(plan, q, k, v), slow)
    torch.testing.assert_close(TeacherForced(plan, torch.float64)(0, q, k, v), slow)
    assert BoundedCache(plan, 3, 8).bytes == plan.count_entries() * 3 * 8 * 4 * 2


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("budget", [{"lines": 1}, {"lines": 2}, {"tokens": 7}])
def test_the_oracle_evicts_what_the_rest_of_the_image_looks_at_least(budget, kv_heads, merge):
    """Image by image the slow model with the victims that Belady's rule finds in its attention."""
    model = tiny_transformer(kv_heads=kv_heads)
    labels, codes = images(model)
    plan = fewlines.cache("oracle", merge=merge, **budget).plan(model.shape.geometry)
    fast = forward_oracle(model, labels, codes, plan)
    for row in range(len(labels)):
        alone = (labels[row : row + 1], codes[row : row + 1])
        seen = capture_attention(model, *alone)
        victims = np.full((model.shape.layers, kv_heads, N), NO_VICTIM)
        for layer, head in itertools.product(range(model.shape.layers), range(kv_heads)):
            resident: list[int] = []
            for step in range(N):
                if len(resident) == plan.capacity[layer, head]:
                    score = {k: float(seen[layer][0, head, step:, k].sum()) for k in resident}
                    victims[layer, head, step] = min(resident, key=score.__getitem__)
                    resident.remove(victims[layer, head, step])
                resident.append(step)
        known = replace(plan, victims=victims, oracle=None)
        slow = model.teacher_forced(*alone, SlowAttention(known))
        torch.testing.assert_close(fast[row : row + 1], slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "options"),
    [("headkv_online", {"sinks": 0, "mass": 0.5, "near": 0.4}), ("diagonal_online", {})],
)
@pytest.mark.parametrize("budget", [{"lines": 1}, {"lines": 2}, {"tokens": 7}])
def test_what_differs_from_image_to_image_is_what_a_mask_hides(policy, options, budget):
    """Image by image causal attention with what is evicted, or not read, masked entry by entry."""
    model = tiny_transformer()
    labels, codes = images(model)
    plan = fewlines.cache(policy, **budget, **options).plan(model.shape.geometry)
    fast = forward_oracle(model, labels, codes, plan)
    masks, kinds = [], set()
    for layer, seen in enumerate(capture_attention(model, labels, codes)):
        capacity = torch.from_numpy(plan.capacity[layer])
        evicted = plan.oracle.find_evictions(seen, capacity)[:, :, None]
        unread = plan.oracle.find_unread(seen, capacity)
        steps = torch.arange(N)
        sees = (steps <= steps[:, None]) & (steps[:, None] < evicted)
        held = sees.sum(-1)
        assert (held.sum(1) <= capacity.sum()).all()  # at every step, of the layer
        kinds |= set(held.amax(-1).flatten().tolist())
        if unread is not None:
            assert not unread.diagonal(dim1=-2, dim2=-1).any()
            sees = sees & ~unread
        sees = torch.cat([torch.zeros_like(sees[:, :, :1]), sees], dim=2)  # the prefix comes first
        sees = F.pad(sees, (1, 0), value=True)[..., :N, :N]
        masks.append(sees.repeat_interleave(model.shape.heads // model.shape.kv_heads, dim=1))

    def attend(layer, q, k, v):
        mask = masks[layer]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    slow = model.teacher_forced(labels, codes, attend)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert (len(kinds) > 1) == (policy == "headkv_online")  # heads of several capacities
    assert fewlines.cache(policy, lines=99).plan(model.shape.geometry).is_full


def test_nothing_can_be_drawn_with_the_oracle(model):
    with pytest.raises(FewlinesError, match="is applied to a finished image"):
        fewlines.generate(model, [0], fewlines.cache("oracle", lines=1))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("policy", DECODED)
def test_completion_with_guidance_draws_what_the_slow_model_finds_likeliest(policy, merge):
    """The first line and a half given; conditional and unconditional rows each have their cache."""
    model = tiny_transformer()
    labels, codes = images(model, batch=2)
    geometry = model.shape.geometry
    cache = calibrated(fewlines.cache(policy, lines=2, merge=merge), geometry)
    sampler, prompt = Sampler(top_k=1, guidance=1.5), codes[:, :8]
    drawn = fewlines.generate(model, labels, cache, sampler=sampler, prompt=prompt)
    assert torch.equal(drawn[:, :8], prompt)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])
    attend = SlowAttention(cache.plan(geometry))
    logits = model.teacher_forced(both, torch.cat([drawn, drawn]), attend)
    assert torch.equal(sampler.guide(logits).argmax(-1)[:, 8:], drawn[:, 8:])


KERNEL_CACHES = [
    ("full", {}),
    ("streaming", {"lines": 2, "sinks": 2}),
    ("random", {"lines": 2}),
    ("random", {"tokens": 7, "merge": True}),
    ("line_ar", {"lines": 1.6, "anchor": 1}),
    ("line_ar", {"lines": 2.8, "anchor": "auto", "recent": 1.4}),
    ("h2o", {"lines": 2, "merge": True}),
    ("scheduled", {"lines": 2, "merge": True, "allocation": "bands"}),
]


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "storage", "tolerance"),
    [
        (kv_heads, 8, *each)
        for kv_heads in (4, 2)
        # a last bit of a sum may round a stored number the other way
        for each in ((torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2))
    ]
    + [(4, 100, torch.float32, 1e-4)],  # as LlamaGen's 3B has it
)
@pytest.mark.parametrize(("policy", "options"), KERNEL_CACHES)
def test_the_compiled_kernel_and_torch_agree(
    monkeypatch, policy, options, kv_heads, head_dim, storage, tolerance
):
    """In whatever keys and values are stored: arithmetic is float32 on both sides."""
    model = tiny_transformer(kv_heads=kv_heads, head_dim=head_dim)
    labels, codes = images(model)
    geometry = model.shape.geometry
    plan = calibrated(fewlines.cache(policy, **options), geometry).plan(geometry)

    def logits():
        buffers = BoundedCache(plan, len(labels), model.shape.head_dim, storage)
        return step_by_step(model, labels, codes, buffers)

    compiled = logits()
    monkeypatch.setattr(sys.modules[BoundedCache.__module__], "compiled_step", torch_step)
    by_torch = logits()
    assert not torch.equal(compiled, by_torch)  # two implementations, not one
    torch.testing.assert_close(compiled, by_torch, atol=tolerance, rtol=tolerance)


def test_the_kernel_keeps_to_torchs_threads(model):
    plan = fewlines.cache("full").plan(model.shape.geometry)
    before = torch.get_num_threads()
    for threads in (2, 1):
        torch.set_num_threads(threads)
        BoundedCache(plan, 1, model.shape.head_dim)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(before)
