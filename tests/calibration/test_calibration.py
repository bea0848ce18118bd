from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewlines
from conftest import GRID, images, tiny_transformer
from fewlines.attention.teacher_forced import TeacherForced
from fewlines.cache.allocation import find_hull
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import NO_VICTIM
from fewlines.cache.spec import make_policy
from fewlines.calibration.capture import capture_expected
from fewlines.calibration.data import Calibration, LossCurves
from fewlines.calibration.losses import BANDS, list_capacities, measure_losses
from fewlines.cli import main
from fewlines.errors import FewlinesError
from fewlines.files import write_tensors
from fewlines.geometry import Geometry
from fewlines.metrics.head_losses import limit_by_schedule
from fewlines.models.checkpoint import save_network

N = GRID[0] * GRID[1]


def measure_curves(model, labels, codes, found, merge_slots=1) -> LossCurves:
    """What each head loses under the schedule, its victims merged into so many slots."""
    capacities = list_capacities(model.geometry)
    limit = limit_by_schedule(model, found, capacities, merge_slots)
    loss = measure_losses(model, labels, codes, limit, len(capacities))
    return LossCurves(np.array(capacities), loss)


def test_capture_expected_is_the_mean_of_what_the_model_does():
    model = tiny_transformer()
    codes = torch.randint(16, (5, N), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5) % 3
    found = capture_expected(model, labels, codes, batch=2)
    weights = []

    def attend(layer, q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores += torch.full_like(scores[0, 0], -torch.inf).triu(1)
        weights.append(scores.softmax(-1))
        return weights[-1] @ v

    logits = model.teacher_forced(labels, codes, attend)
    torch.testing.assert_close(logits, model.teacher_forced(labels, codes), atol=1e-4, rtol=1e-4)
    mean = torch.stack(weights).mean(1).unflatten(1, (2, 2)).mean(2)[..., 1:, 1:]
    np.testing.assert_allclose(found.attention[..., :-1, :-1], mean.numpy(), atol=1e-5)
    assert not found.attention[..., -1].any()


def test_the_schedule_lets_go_what_nobody_will_look_at():
    """Three tokens of capacity on a line of six: the first is looked at to the end, the second
    never again, the others once, by the next query."""
    n = 6
    attention = np.zeros((1, 1, n, n), np.float32)
    attention[..., :, 0] = 1
    for step in range(1, n):
        attention[..., step, step - 1] += 1
    calibration = Calibration(attention, (1, n), images=1)
    cache = replace(fewlines.cache("scheduled", tokens=3), calibration=calibration)
    plan = cache.plan(Geometry((1, n), prefix=1, layers=1, heads=1))
    assert plan.victims[0, 0].tolist() == [NO_VICTIM, NO_VICTIM, NO_VICTIM, 1, 2, 3]


def test_a_calibration_survives_its_file_and_fits_one_model_only(tmp_path):
    path = tmp_path / "calibration.safetensors"
    attention = np.random.default_rng(0).random((2, 2, N, N), np.float32)
    curves = LossCurves(np.array([2, N]), np.ones((2, 2, 2)))
    Calibration(attention, GRID, 7, curves).save(path)
    again = Calibration.load(path)
    assert again.curves is not None
    assert again.curves.capacities.tolist() == [2, N]
    assert (again.curves.loss == 1).all()
    assert (again.grid, again.images) == (GRID, 7)
    np.testing.assert_allclose(again.attention, attention, atol=1e-3)
    cache = fewlines.cache("scheduled", lines=1, calibration=path)
    cache.plan(tiny_transformer().shape.geometry)
    with pytest.raises(FewlinesError, match=r"2 heads on a 4×5 grid, but .* 4 on 4×5"):
        cache.plan(tiny_transformer(kv_heads=4).shape.geometry)
    write_tensors(path, {"weights": torch.zeros(1)})
    with pytest.raises(FewlinesError, match="is not a calibration"):
        Calibration.load(path)


@pytest.mark.parametrize(("stretched", "up"), [(False, 2), (True, 4)])
def test_what_is_carried_to_another_grid_lies_as_far_away(stretched, up):
    """By tokens, or by place in the picture, which has twice as many tokens to a side there."""
    small, large = (4, 5), (8, 10)
    line, column = np.divmod(np.arange(20), 5)
    looks = (line[:, None] - line == 2) & (column[:, None] == column)  # two lines up
    calibration = Calibration(looks[None, None].astype(np.float32), small, images=1)
    looks[-1] = False  # the last token never asks
    np.testing.assert_array_equal(calibration.transfer(small, stretched).attention[0, 0], looks)
    found = calibration.transfer(large, stretched)
    assert found.grid == large
    step = 7 * 10 + 4
    assert found.attention[0, 0, step, step - up * 10] == 1
    assert not found.attention[0, 0, step, step - 6 * 10]
    assert not np.triu(found.attention[0, 0], 1).any()


def test_budgets_by_mass_keep_the_total_and_give_where_it_counts():
    """One head looks at everything before it, one only at the token just before: the second needs
    two entries, all others are the first one's."""
    n = 8
    attention = np.zeros((1, 2, n, n), np.float32)
    attention[0, 0] = np.tril(np.full((n, n), 1 / n))
    for step in range(1, n):
        attention[0, 1, step, step - 1] = 1
    calibration = Calibration(attention, (1, n), images=1)
    geometry = Geometry((1, n), prefix=1, layers=1, heads=2)
    uniform = fewlines.cache("scheduled", tokens=4, merge=True)
    split = replace(uniform, allocation="mass", calibration=calibration)
    plan = split.plan(geometry)
    assert plan.entries.tolist() == [[5, 3]]  # each with its summary slot
    assert (
        plan.count_entries() == replace(split, allocation="uniform").plan(geometry).count_entries()
    )


def test_calibrated_budgets_go_to_the_heads_that_lose_most():
    """Of two heads, one loses nothing from four tokens on, the other falls all the way."""
    n = 20
    attention = np.tril(np.ones((1, 2, n, n), np.float32))
    loss = np.array([[[1.0, 0, 0, 0], [1.0, 0.5, 0.25, 0]]])
    curves = LossCurves(np.array([2, 4, 8, n]), loss)
    calibration = Calibration(attention, (1, n), 1, curves)
    geometry = Geometry((1, n), prefix=1, layers=1, heads=2)
    cache = fewlines.cache("scheduled", tokens=9, merge=True, allocation="calibrated")
    with pytest.raises(FewlinesError, match="does not say what each head loses"):
        replace(cache, calibration=replace(calibration, curves=None)).plan(geometry)
    plan = replace(cache, calibration=calibration).plan(geometry)
    assert plan.capacity.tolist() == [[3, 13]]  # at three it has lost almost all it can
    with pytest.raises(FewlinesError, match="with the schedule's victims merged"):
        fewlines.cache("scheduled", tokens=9, allocation="calibrated")


def test_a_head_has_several_summaries_where_they_lose_less_than_as_many_tokens():
    n = 20
    attention = np.tril(np.ones((1, 2, n, n), np.float32))
    alike = np.array([[[1.0, 0.5, 0.25, 0], [1.0, 0.5, 0.25, 0]]])
    few = np.array([[[0.9, 0.001, 0.001, 0], [1.0, 0.6, 0.3, 0]]])  # with four merge_slots
    curves = LossCurves(np.array([2, 4, 8, n]), alike, {4: few})
    geometry = Geometry((2, n // 2), prefix=1, layers=1, heads=2)
    calibration = Calibration(attention, geometry.grid, 1, curves)
    cache = fewlines.cache("scheduled", tokens=9, merge=True, allocation="bands")
    plain = replace(cache, calibration=replace(calibration, curves=replace(curves, of_bands={})))
    with pytest.raises(FewlinesError, match="'fewlines calibrate --calibration' adds that"):
        plain.plan(geometry)
    plan = replace(cache, calibration=calibration).plan(geometry)
    assert plan.merge_slots.tolist() == [[4, 1]]
    assert plan.entries.sum() == 2 * 9  # merge_slots and all
    assert plan.capacity[0, 0] >= 2


@pytest.mark.parametrize("count", BANDS)
def test_curves_of_several_summaries_are_what_such_a_head_loses(model, count):
    geometry = model.shape.geometry
    shape, n = (geometry.layers, geometry.heads), geometry.n_tokens
    labels, codes = images(model, 4)
    found = capture_expected(model, labels, codes, batch=2)
    curves = measure_curves(model, labels, codes, found, count)
    capacity = int(curves.capacities[2])
    schedule = make_policy("scheduled", {}).choose_victims(
        geometry, np.full(shape, capacity), found
    )
    victims = np.full_like(schedule, NO_VICTIM)
    capacities, merge_slots = np.full(shape, n), np.ones(shape, int)
    capacities[1, 0], victims[1, 0], merge_slots[1, 0] = capacity, schedule[1, 0], count
    limits = TeacherForced(EvictionPlan(geometry, capacities, merge_slots, victims))
    full, under = (
        model.teacher_forced(labels, codes, *attend).log_softmax(-1) for attend in ((), (limits,))
    )
    loss = (full.exp() * (full - under)).sum(-1).mean().item()
    assert curves.loss[1, 0, 2] == pytest.approx(loss, rel=1e-3, abs=1e-6)


def test_curves_fall_to_nothing_where_nothing_is_let_go(model):
    codes = torch.randint(16, (4, N), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4) % 3
    found = capture_expected(model, labels, codes, batch=2)
    curves = measure_curves(model, labels, codes, found)
    assert curves.capacities.tolist() == list_capacities(model.shape.geometry)
    assert {4, 5, 6, 7} < set(curves.capacities.tolist())  # where the line above, of 5, just fits
    assert curves.loss.shape == (2, 2, len(curves.capacities))
    assert (curves.loss[..., :-1] > 0).all()
    assert (curves.loss[..., 0] > 3 * curves.loss[..., -2]).all()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_curves_are_what_a_cache_loses_that_limits_one_head(kv_heads):
    model = tiny_transformer(kv_heads=kv_heads)
    geometry, shape = model.shape.geometry, (2, kv_heads)
    n = geometry.n_tokens
    codes = torch.randint(16, (4, n), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4) % 3
    found = capture_expected(model, labels, codes, batch=2)
    curves = measure_curves(model, labels, codes, found)
    index = 3
    capacity = int(curves.capacities[index])
    schedule = make_policy("scheduled", {}).choose_victims(
        geometry, np.full(shape, capacity), found
    )
    full = model.teacher_forced(labels, codes).log_softmax(-1)
    for head in np.ndindex(shape):
        capacities, victims = np.full(shape, n), np.full_like(schedule, NO_VICTIM)
        capacities[head], victims[head] = capacity, schedule[head]
        limits = TeacherForced(EvictionPlan(geometry, capacities, np.ones(shape, int), victims))
        under = model.teacher_forced(labels, codes, limits).log_softmax(-1)
        loss = (full.exp() * (full - under)).sum(-1).mean().item()
        assert curves.loss[head][index] == pytest.approx(loss, rel=1e-3, abs=1e-6)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_the_hull_is_convex_and_below(curve):
    values = np.array(curve)
    hull = find_hull(values)
    assert (hull <= values + 1e-9).all()
    assert (np.diff(hull, 2) >= -1e-9).all()
    assert (hull[0], hull[-1]) == (values[0], values[-1])


def test_the_curve_tells_whom_a_schedule_serves(tiny_files):
    """A schedule calibrated on a model's own images loses what the table of likelihoods says; one
    of another model is another schedule, and so is one that was transferred from another grid."""
    attention = np.tril(np.ones((2, 2, 6, 6), np.float32))
    Calibration(attention, (2, 3), images=1).save(tiny_files / "small")
    text = (tiny_files / "config").read_text()
    transferred = f"calibration: {{transferred: {tiny_files / 'small'}, "
    (tiny_files / "config").write_text(text.replace("calibration: {", transferred))
    other = tiny_transformer()
    other.layers[0].attention.wqkv.weight.mul_(3)  # looks elsewhere
    (tiny_files / "adapted").mkdir()
    save_network(tiny_files / "adapted/model.safetensors", other)
    given = {name: name for name in ("config", "model", "tokens")} | {"output": "curve.csv"}
    options = [f"--{name}={tiny_files / file}" for name, file in given.items()]
    options += ["--adapted", str(tiny_files / "adapted/model.safetensors")]
    assert main(["calibration-curve", *options]) == 0
    table = pd.read_csv(tiny_files / "curve.csv").set_index(["model", "calibrated_on"])
    assert table.loc[("base", "first 6"), "nll_delta"] != 0
    own, bases = (table.loc[("adapted", name), "nll_delta"] for name in ("adapted's own", "base's"))
    assert own != bases
    assert ("base, without class", "first 6, without their class") in table.index
    assert ("base", "2×3 tokens, transferred by place") in table.index
    assert (table["policy"] == "scheduled").all()
