"""The bound: nothing a policy says can make a head hold more than its capacity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewlines
from conftest import DECODED, calibrated
from fewlines.attention.buffer import BoundedCache
from fewlines.attention.slots import RankedSlots
from fewlines.cache.allocation import Total, get_allocation
from fewlines.cache.budget import Budget
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import NO_VICTIM, OraclePolicy, ScoringPolicy, list_policies
from fewlines.cache.spec import Cache, make_policy
from fewlines.calibration.data import Calibration
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry

POLICIES = [
    name
    for name, policy in list_policies().items()
    if not issubclass(policy, ScoringPolicy | OraclePolicy) and name != "full"
]


@given(
    policy=st.sampled_from(POLICIES),
    height=st.integers(1, 6),
    width=st.integers(2, 6),
    tokens=st.integers(2, 40),
    merge=st.booleans(),
)
def test_no_policy_exceeds_its_budget_and_nobody_comes_back(policy, height, width, tokens, merge):
    geometry = Geometry((height, width), prefix=1, layers=2, heads=3)
    cache = calibrated(fewlines.cache(policy, tokens=tokens, merge=merge), geometry)
    plan = cache.plan(geometry)
    slots, victims = plan.slots, plan.victims
    assert slots.max() < min(tokens, geometry.n_tokens) - plan.merge_slots.max()
    for layer, head in np.ndindex(slots.shape[:2]):
        held: dict[int, int] = {}  # slot -> token
        gone: set[int] = set()
        for step in range(geometry.n_tokens):
            slot, victim = slots[layer, head, step], victims[layer, head, step]
            assert held.get(slot, NO_VICTIM) == victim  # no token vanishes unannounced
            held[slot] = step
            gone.add(victim)
            assert len(held) + plan.merge_slots[layer, head] <= tokens
            assert len(set(held.values())) == len(held)
            assert not gone & set(held.values())


@given(
    policy=st.sampled_from([name for name in DECODED if name not in POLICIES]),
    height=st.integers(1, 6),
    width=st.integers(2, 6),
    tokens=st.integers(2, 40),
    merge=st.booleans(),
    every=st.integers(0, 6),
    seed=st.integers(0, 9),
)
@settings(deadline=None)  # the first example compiles the kernel
def test_scoring_keeps_the_bound_and_nobody_comes_back(
    policy, height, width, tokens, merge, every, seed
):
    """Whatever was seen: each row has the new token, and of the old ones all but its victim."""
    geometry = Geometry((height, width), prefix=2, layers=1, heads=3)
    cache = calibrated(fewlines.cache(policy, tokens=tokens, merge=merge, every=every), geometry)
    plan = cache.plan(geometry)
    if plan.scoring is None:
        return  # the budget holds the image
    generator = torch.Generator().manual_seed(seed)
    buffers = BoundedCache(plan, batch=2, head_dim=8)
    (group,) = buffers.layers[0]
    slots = group.slots
    assert isinstance(slots, RankedSlots)
    prefix = torch.randn(2, 3, 2, 8, generator=generator)
    buffers(0, prefix, prefix, prefix)
    kept, held = group.k[:, :, :2].clone(), [[set() for _ in range(3)] for _ in range(2)]
    for step in range(geometry.n_tokens):
        buffers.advance(step)
        buffers(0, *(torch.randn(2, 3, 1, 8, generator=generator) for _ in range(3)))
        assert torch.equal(group.k[:, :, :2], kept)
        for row, head in np.ndindex(2, 3):
            entries = slots.positions[row, head].tolist()
            now = {token for token in entries if token != NO_VICTIM}
            assert len(now) == sum(token != NO_VICTIM for token in entries)
            assert len(now) == min(step + 1, tokens - merge)
            assert step in now
            assert now - {step} <= held[row][head]
            held[row][head] = now


@pytest.mark.parametrize("every", [0, 1, 2])
def test_an_instrument_goes_to_any_step_and_back(every):
    """Of groups that are asked at different steps: residents are the last tokens, whoever held the
    entries before."""
    geometry = Geometry((4, 5), prefix=1, layers=2, heads=2)
    cache = fewlines.cache("h2o", lines=2, every=every, allocation="pyramid")
    buffers = BoundedCache(cache.plan(geometry), batch=2, head_dim=8)
    groups = [group for layer in buffers.layers for group in layer]
    assert len({group.slots.capacity for group in groups}) > 1
    for step in (13, 7, 18, 4, 0):
        buffers.seek(step)
        for last in range(step, min(step + 4, geometry.n_tokens)):
            buffers.advance(last)
            for group in groups:
                held = group.slots.positions
                count = min(last + 1, group.slots.capacity)
                assert ((held != NO_VICTIM).sum(-1) == count).all()
                assert (held.amax(-1) == last).all()
                written = held.gather(-1, (group.slots.slot - 1)[..., None])
                assert (written == last).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_of_the_whole_image_evicts_nobody(policy):
    geometry = Geometry((3, 4), prefix=1, layers=1, heads=1)
    cache = calibrated(fewlines.cache(policy, lines=3, merge=True), geometry)
    plan = cache.plan(geometry)
    assert plan.is_full
    assert plan.count_entries() == 13


def test_lines_keeps_the_last_tokens_and_streaming_the_first_ones_too():
    geometry = Geometry((4, 5), prefix=1, layers=1, heads=1)

    def resident(cache: Cache, step: int) -> list[int]:
        evicted_at = cache.plan(geometry).evicted_at[0, 0]
        return [token for token in range(step + 1) if step < evicted_at[token]]

    assert resident(fewlines.cache("lines", lines=2), 17) == list(range(8, 18))
    assert resident(fewlines.cache("streaming", lines=2), 17) == [0, 1, 2, 3, *range(12, 18)]
    assert resident(fewlines.cache("streaming", lines=2, sinks=1), 17) == [0, *range(9, 18)]
    assert resident(fewlines.cache("streaming", lines=2, merge=True), 17) == [
        0,
        1,
        2,
        3,
        *range(13, 18),
    ]


@pytest.mark.parametrize(
    ("victims", "message"),
    [
        ([NO_VICTIM] * 4, "keeps 3 tokens at step 2, capacity 2"),
        ([NO_VICTIM, NO_VICTIM, 2, 1], "not resident"),
    ],
)
def test_a_policy_that_cheats_is_refused(victims, message):
    geometry = Geometry((2, 2), prefix=1, layers=1, heads=1)
    with pytest.raises(FewlinesError, match=message):
        EvictionPlan(geometry, np.array([[2]]), np.array([[0]]), np.array([[victims]]))


def test_wrong_caches_are_explained():
    for build, message in (
        (
            lambda: fewlines.cache("lins", lines=3),
            "unknown policy 'lins'; there are corrected, diagonal, diagonal_online, fixed",
        ),
        (lambda: fewlines.cache("lines"), "needs a budget"),
        (lambda: fewlines.cache("lines", lines=3, tokens=4), "not several"),
        (lambda: fewlines.cache("lines", lines=3, sinks=4), "does not take sinks"),
        (lambda: fewlines.cache("full", lines=3), "leave out budget"),
        (
            lambda: fewlines.cache("lines", tokens=1, merge=True).plan(Geometry((2, 2), 1, 1, 1)),
            "no capacity for the token being decoded",
        ),
        (
            lambda: fewlines.cache("scheduled", tokens=2).plan(Geometry((2, 2), 1, 1, 1)),
            "scheduled needs a calibration of this model; 'fewlines calibrate' writes one",
        ),
        (lambda: Budget.parse({"lines": "many"}), "'many' is not a number of lines"),
    ):
        with pytest.raises(FewlinesError, match=message):
            build()


def allocate(name, geometry, total, calibration=None, policy="lines"):
    """Capacities of a policy that drops its victims."""
    asked = Total(make_policy(policy, {}), geometry, total, False, calibration)
    capacity, merge_slots = get_allocation(name).allocate(asked)
    assert not merge_slots.any()
    return capacity


@pytest.mark.parametrize("layers", [1, 2, 6, 24])
@pytest.mark.parametrize("tokens", [2, 3, 28, 42, 150, 195])
def test_a_pyramid_falls_with_depth_and_holds_what_the_uniform_split_holds(layers, tokens):
    geometry = Geometry((14, 14), prefix=1, layers=layers, heads=3)
    capacities = allocate("pyramid", geometry, tokens * layers * 3)
    assert capacities.sum() == tokens * layers * 3
    assert (np.diff(capacities, axis=0) <= 0).all()
    assert capacities.min() >= 2
    assert capacities.max() <= 196
    assert (capacities == capacities[:, :1]).all()


def test_a_local_head_keeps_its_reach_and_frees_the_rest():
    geometry = Geometry((4, 5), prefix=1, layers=1, heads=3)
    near, far = np.eye(20, dtype=np.float32), np.tri(20, dtype=np.float32)
    attention = np.stack([near + np.eye(20, k=-3, dtype=np.float32), far, far])[None]
    capacities = allocate("headkv", geometry, 3 * 8, Calibration(attention, (4, 5), images=1))
    assert capacities.tolist() == [[4, 10, 10]]  # 4 tokens back is as far as the first head looks
    # A window of four beside the sinks, not less them.
    sinks = allocate(
        "headkv", geometry, 3 * 9, Calibration(attention, (4, 5), images=1), "streaming"
    )
    assert sinks.tolist() == [[8, 10, 9]]
    everywhere = Calibration(np.stack([far] * 3)[None], (4, 5), images=1)
    assert (allocate("headkv", geometry, 3 * 8, everywhere) == 8).all()
    nowhere = Calibration(np.stack([near] * 3)[None], (4, 5), images=1)
    assert (allocate("headkv", geometry, 3 * 8, nowhere) == 8).all()


def test_heads_of_a_layer_that_look_at_more_get_more():
    """Ada-KV: joint ranks. A head that looks at one token frees most of its capacity for one that
    looks at all; each layer holds its own total."""
    geometry = Geometry((4, 5), prefix=1, layers=2, heads=2)
    narrow = np.eye(20, dtype=np.float32)
    wide = np.tri(20, dtype=np.float32) / np.arange(1, 21, dtype=np.float32)[:, None]
    attention = np.stack([[narrow, wide], [wide, narrow]])
    capacities = allocate("ada", geometry, 4 * 8, Calibration(attention, (4, 5), images=1))
    assert capacities.tolist() == [[4, 12], [12, 4]]
