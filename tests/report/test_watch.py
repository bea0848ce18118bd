from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import fewlines
from conftest import GRID, calibrated
from fewlines.config import validate_experiment
from fewlines.decode.loop import decode
from fewlines.decode.sampler import draw_noise
from fewlines.models.checkpoint import save_network
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape
from fewlines.report.watch import GONE, HELD, NEWEST, UNBORN, find_residents
from fewlines.stages.watch import _Evictions, watch

N = GRID[0] * GRID[1]


def test_residents_are_what_is_neither_to_come_nor_gone():
    evicted = np.array([[2, 4, 4, 4]])
    held = find_residents(evicted, 2, (2, 2))
    assert held.tolist() == [[[GONE, HELD], [NEWEST, UNBORN]]]
    assert find_residents(evicted, 1, (2, 2)).tolist() == [[[HELD, NEWEST], [UNBORN, UNBORN]]]


@pytest.mark.parametrize("policy", ["streaming", "random", "scheduled", "h2o", "line_ar"])
def test_no_head_is_seen_to_hold_more_than_its_room(model, policy):
    geometry = model.shape.geometry
    cache = calibrated(fewlines.cache(policy, lines=2, merge=True), geometry)
    plan = cache.plan(geometry)
    evictions = _Evictions(plan)
    noise = draw_noise(0, [0], N)
    decode(model, torch.tensor([1]), noise, cache, watch=evictions.see)
    full = 0
    for step in range(N - 1):
        held = find_residents(evictions.evicted_at, step, GRID) >= HELD
        counts = held.sum((2, 3))
        assert (counts <= plan.capacity).all()
        full += int((counts == plan.capacity).all())
    assert full == N - int(plan.capacity.max())  # and exactly that once it is full


def test_watching_writes_an_animation_and_a_page(model, tmp_path):
    tokenizer = ConvTokenizer(TokenizerShape(1, (8, 8), 0, 16, 4))
    save_network(tmp_path / "tokenizer.safetensors", tokenizer)
    save_network(tmp_path / "model.safetensors", model)
    caches = [{"policy": "full"}, {"policy": "line_ar", "budget": {"lines": 2}}]
    config = validate_experiment({"caches": caches, "paper": {"caches": ["line_ar-2lines"]}})
    watch(
        config,
        tmp_path / "model.safetensors",
        tmp_path / "tokenizer.safetensors",
        "line_ar-2lines",
        tmp_path / "watch.gif",
        tmp_path / "watch.html",
        frames=7,
    )
    with Image.open(tmp_path / "watch.gif") as animation:
        assert animation.n_frames == 7
    assert (tmp_path / "watch.html").read_text().count("iVBOR") == 7
