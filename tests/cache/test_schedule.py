"""A cache's schedule in a file of its own draws what the cache itself draws."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewlines
from conftest import CACHES, calibrated, images, tiny_transformer
from fewlines.cache.schedule import Schedule
from fewlines.calibration.capture import capture_by_layer, capture_expected
from fewlines.cli import main
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry

MODEL = tiny_transformer()
KNOWN = [cache for cache in CACHES if cache.plan(MODEL.shape.geometry).victims is not None]


@pytest.mark.parametrize("cache", KNOWN, ids=lambda cache: cache.slug)
def test_the_same_slots_and_images_come_from_the_file(cache, tmp_path):
    geometry = MODEL.shape.geometry
    Schedule.of(cache, geometry).save(tmp_path / "schedule")
    loaded = fewlines.load_schedule(tmp_path / "schedule")
    assert loaded.slug == cache.slug
    for name in ("capacity", "victims", "slots", "merge_slots"):
        one, other = (getattr(x.plan(geometry), name) for x in (loaded, cache))
        np.testing.assert_array_equal(one, other)
    drawn = [fewlines.generate(MODEL, [0, 1], limit, seed=3) for limit in (cache, loaded)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("policy", ["scheduled", "diagonal"])
@pytest.mark.parametrize("lines", [1, 4])
def test_a_layer_at_a_time_is_the_same_schedule(policy, lines):
    geometry, given = MODEL.shape.geometry, images(MODEL, 7)
    cache = fewlines.cache(policy, lines=lines, merge=True)
    whole = replace(cache, calibration=capture_expected(MODEL, *given, batch=3))
    layers = capture_by_layer(MODEL, *given, batch=3)
    found = Schedule.by_layer(cache, geometry, layers).evictions
    expected = whole.plan(geometry)
    np.testing.assert_array_equal(found.victims, expected.victims)
    np.testing.assert_array_equal(found.capacity, expected.capacity)
    np.testing.assert_array_equal(found.merge_slots, expected.merge_slots)


def test_a_cache_that_is_served_holds_no_calibration_where_nothing_asks_for_it():
    geometry = Geometry((14, 14), prefix=1, layers=6, heads=3)
    held = {}
    for policy in ("scheduled", "corrected", "line_ar"):
        cache = calibrated(fewlines.cache(policy, lines=2, merge=True), geometry)
        held[policy] = len(pickle.dumps(Schedule.settle(cache, geometry)))
    calibration = 6 * 3 * 196**2 * 4  # bytes
    assert held["scheduled"] < calibration / 10
    assert held["corrected"] > calibration  # it goes by it while an image is drawn
    assert held["line_ar"] < calibration / 10


def test_it_takes_a_few_kilobytes_at_the_default_model(tmp_path):
    geometry = Geometry((14, 14), prefix=1, layers=6, heads=3)
    cache = calibrated(fewlines.cache("scheduled", lines=2, merge=True), geometry)
    Schedule.of(cache, geometry).save(tmp_path / "schedule")
    assert (tmp_path / "schedule").stat().st_size < 5_000


def test_other_models_and_policies_that_look_are_refused(tmp_path):
    with pytest.raises(FewlinesError, match="line_ar picks its victims while an image is drawn"):
        Schedule.of(fewlines.cache("line_ar", lines=2), MODEL.shape.geometry)
    schedule = Schedule.of(fewlines.cache("lines", lines=2), MODEL.shape.geometry)
    with pytest.raises(FewlinesError, match="lines-2lines was made for another model"):
        schedule.plan(Geometry((4, 5), prefix=1, layers=3, heads=2))


def test_the_command_writes_what_load_schedule_reads(tiny_files, capsys):
    files = {name: str(tiny_files / name) for name in ("config", "model", "tokens")}
    calibration, output = str(tiny_files / "calibration"), tiny_files / "schedule"
    given = ["--config", files["config"], "--model", files["model"]]
    assert main(["calibrate", *given, "--tokens", files["tokens"], "--output", calibration]) == 0
    export = ["export-schedule", *given, "--cache", "scheduled-1lines", "--output", str(output)]
    assert main(export) == 2
    assert "scheduled needs a calibration of this model" in capsys.readouterr().err
    assert main([*export, "--calibration", calibration]) == 0
    schedule = fewlines.load_schedule(output)
    assert schedule.plan(MODEL.shape.geometry).entries.tolist() == [[5, 5], [5, 5]]
    with pytest.raises(FewlinesError, match="is not a schedule"):
        fewlines.load_schedule(calibration)
    assert main([*export, "--calibration", calibration, "--tokens", files["tokens"]]) == 2
    assert "give one of the two" in capsys.readouterr().err
    assert main([*export, "--tokens", files["tokens"]]) == 0  # measured there and then
    found = fewlines.load_schedule(output)
    assert (found.evictions.victims == schedule.evictions.victims).mean() > 0.9  # 16 bits apart
    split = fewlines.cache("scheduled", lines=2, merge=True, allocation="mass")
    with pytest.raises(FewlinesError, match="among layers and needs the calibration of all of"):
        Schedule.by_layer(split, MODEL.shape.geometry, [])
