"""The efficiency harness on a real, if small, decode; the cost model against what is known."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import fewlines
from conftest import CACHES
from fewlines import machine
from fewlines.attention.buffer import BoundedCache
from fewlines.bench.efficiency import (
    Workers,
    find_largest_batch,
    make_settings,
    measure_setting,
)
from fewlines.bench.harness import OUT_OF_MEMORY, Worker
from fewlines.bench.roofline import keep_best
from fewlines.config import Experiment
from fewlines.config.settings import EfficiencySettings
from fewlines.devices import DEVICES
from fewlines.errors import FewlinesError
from fewlines.files import read_json
from fewlines.models.base import find_published
from fewlines.models.llamagen.cost import Decode
from fewlines.models.llamagen.model import Transformer
from fewlines.report.efficiency import make_efficiency_table, make_scaling_table
from fewlines.stages.efficiency import measure_efficiency
from fewlines.stages.plan import plan


def test_of_two_probes_the_better_figures_are_the_bound():
    one = {
        "bandwidth": 2.0,
        "linear_rates": {"float32": {"linear": 5.0, "packed": 1.0}},
        "linear_flops": 7,
        "operator_seconds": 0.2,
    }
    other = {
        "bandwidth": 1.0,
        "linear_rates": {"float32": {"linear": 4.0, "packed": 3.0}},
        "linear_flops": 7,
        "operator_seconds": 0.1,
    }
    assert keep_best(one, other) == {
        "bandwidth": 2.0,
        "linear_rates": {"float32": {"linear": 5.0, "packed": 3.0}},
        "linear_flops": 7,
        "operator_seconds": 0.1,
    }


COLUMNS = [
    "shape", "grid", "n_tokens", "batch", "dtype", "engine", "policy", "budget",
    "seconds_per_image", "kv_bytes", "peak_bytes", "roofline_fraction", "speedup_lean",
    "speedup_bound", "speedup_stock",
]  # fmt: skip
FEW = {"policy": "streaming", "budget": {"lines": 2}}
LINEAR = {"policy": "line_ar", "budget": {"lines": 2}}


def settings(**run):
    run = {"grids": [6], "batches": [2], "caches": [FEW], **run}
    return make_settings(EfficiencySettings(repeats=1, limit_seconds=1000, runs=[run]), threads=1)


def test_settings_of_one_shape_are_told_apart_and_named_as_they_are_written():
    runs = [{"grids": [6], "batches": [2], "caches": [cache]} for cache in (FEW, LINEAR, FEW)]
    made = make_settings(EfficiencySettings(runs=[*runs, {**runs[0], "precision": "auto"}]), 1)
    name = "llamagen-b-6x6-batch2-float32-float32"
    auto = "llamagen-b-6x6-batch2-auto-float32"
    assert list(made) == [name, f"{name}-2", f"{name}-3", auto]
    assert [each.rows[-1].cache.policy.name for each in made.values()][:2] == [
        "streaming",
        "line_ar",
    ]


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_probe_that_fails_leaves_what_was_measured(monkeypatch, fails):
    (setting,) = settings().values()
    probe = {"bandwidth": 1.0, "linear_rates": {}, "linear_flops": 1, "operator_seconds": 1.0}
    answers = [probe, OUT_OF_MEMORY] if fails == "after" else [OUT_OF_MEMORY]

    def ask(workers, limit, question, *arguments):
        return answers.pop(0) if question == "probe" else {"seconds": 1.0, "steps": {}}

    monkeypatch.setattr(Workers, "ask", ask)
    found = measure_setting(setting, repeats=1)
    outcome = "ok" if fails == "after" else OUT_OF_MEMORY
    assert {row["outcome"] for row in found["rows"]} == {outcome}
    assert found["probes"] == ({"2": probe} if fails == "after" else {})


def test_a_measurement_that_was_killed_goes_on(monkeypatch, tmp_path):
    """With its whole rounds, unless they are of other code, or of code that nobody committed."""
    (setting,) = settings().values()
    part, asked = tmp_path / "setting.part", []
    probe = {"bandwidth": 1.0, "linear_rates": {}, "linear_flops": 1, "operator_seconds": 1.0}

    def ask(workers, limit, question, *arguments):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(question)
        return dict(probe) if question == "probe" else {"seconds": float(len(asked)), "steps": {}}

    monkeypatch.setattr(Workers, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        measure_setting(setting, 3, {"commit": "one"}, part)
    asked.clear()
    found = measure_setting(setting, 2, {"commit": "one"}, part)
    assert asked == [*["measure"] * 3, "probe"]
    assert [row["seconds"] for row in found["rows"]] == [[2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]
    late = replace(setting, limit_seconds=99)
    for other, commit in ((setting, "another"), (late, "one"), (setting, "one+"), (setting, "")):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            measure_setting(other, 3, {"commit": commit}, part)
        assert asked == ["probe", *["measure"] * 4]


def test_a_setting_in_which_nothing_fits_is_measured_all_the_same(tmp_path):
    run = {"shape": "llamagen-b", "grids": [6], "batches": [], "caps": [0.01], "caches": [FEW]}
    experiment = Experiment(efficiency=EfficiencySettings(repeats=1, runs=[run]))
    (name,) = make_settings(experiment.efficiency, 1)
    measure_efficiency(experiment, name, tmp_path / "none.json")
    assert read_json(tmp_path / "none.json")["rows"] == []


def test_on_a_gpu_one_process_answers_all(monkeypatch):
    """Its model stays for the rows after."""
    (setting,) = settings(engines=["lean"]).values()
    setting = replace(setting, shape=replace(setting.shape, layers=2))
    begun = []
    start = Worker.__init__
    monkeypatch.setattr(
        Worker, "__init__", lambda self, *given: (begun.append(1), start(self, *given))[1]
    )
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    found = measure_setting(setting, repeats=2)
    assert len(begun) == 1
    assert [len(row["seconds"]) for row in found["rows"]] == [2, 2]


@pytest.fixture(scope="module")
def measured():
    engines = ["lean", "stock", "hf-dynamic"]
    how = {"storage": "float16", "full_run": True}
    ((name, setting),) = settings(engines=engines, caches=[FEW, LINEAR], **how).items()
    assert name == "llamagen-b-6x6-batch2-float32-float16"
    setting = replace(setting, shape=replace(setting.shape, layers=2))  # of twelve: seconds
    hopeless = replace(setting.rows[0], batch=10**9)
    setting = replace(setting, rows=(*setting.rows, hopeless))
    result = measure_setting(replace(setting, rows=setting.rows[:5]), repeats=1)
    lost = measure_setting(replace(setting, rows=setting.rows[5:], shape_name="lost"), repeats=1)
    return [result, lost]


def test_a_setting_is_measured_row_by_row(measured):
    table = make_efficiency_table(measured[:1])
    assert set(COLUMNS) <= set(table)
    assert list(table["outcome"]) == ["ok"] * 5
    assert list(table["engine"]) == ["lean", "stock", "hf-dynamic", "lean", "lean"]
    lean, stock, peer, few, scored = table.to_dict("records")
    entry = 2 * 768 * 2 * 2 * 2  # layers, heads and dimensions, k and v, float16, batch
    assert lean["kv_bytes"] == 37 * entry
    assert few["kv_bytes"] == scored["kv_bytes"] == 13 * entry
    assert stock["kv_bytes"] == peer["kv_bytes"] == 2 * 37 * entry  # float32
    assert lean["speedup_lean"] == lean["speedup_bound"] == 1
    assert few["speedup_bound"] > 1
    assert (table["seconds_per_image"] > 0).all()
    shares = table.loc[[0, 3], ["share_linear", "share_attention", "share_between"]]
    assert ((shares > 0) & (shares < 1)).all(axis=None)
    assert table["integration_error"].notna().all()  # how small it is, is for a quiet machine


def test_what_does_not_fit_is_a_row_that_says_so(measured, monkeypatch):
    (row,) = measured[1]["rows"]
    assert row["outcome"] == "out of memory"
    assert row["seconds"] == []
    ((_, setting),) = settings(engines=["lean"], caches=[]).items()
    late = measure_setting(replace(setting, limit_seconds=0.01), repeats=1)
    assert late["rows"][0]["outcome"] == "time limit"
    table = make_efficiency_table([measured[1], late])
    assert list(table["outcome"]) == ["out of memory", "time limit"]


@pytest.mark.parametrize("cache", [fewlines.cache("full"), *CACHES[::7]], ids=lambda c: c.slug)
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_predicted_bytes_are_those_of_the_live_buffers(model, cache, storage):
    decode = Decode(model.shape, 3, cache, torch.float32, storage)
    buffers = BoundedCache(cache.plan(model.shape.geometry), 3, model.shape.head_dim, storage)
    assert decode.kv_bytes == buffers.bytes


def test_operators_count_the_weights_of_the_real_model():
    shape = find_published("llamagen-b")[1].on((16, 16))
    with torch.device("meta"):
        model = Transformer(shape)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "emb" not in name]
    decode = Decode(shape, 3, fewlines.cache("full"), torch.float32, torch.float32)
    assert decode.linear_flops == 2 * 3 * sum(p.numel() for p in matrices)
    norms = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    assert decode.weight_bytes == sum(p.nbytes for p in model.parameters()) - norms


def test_the_cost_model_knows_what_bounds_a_decode():
    shape = find_published("llamagen-xl")[1].on((64, 64))
    full = Decode(shape, 256, fewlines.cache("full"), torch.bfloat16, torch.bfloat16)
    few = replace(full, cache=fewlines.cache("streaming", lines=4))
    device = DEVICES["h200"]
    assert full.kv_bytes == 36 * 1280 * 2 * 2 * 4097 * 256
    assert few.average_bytes() < full.average_bytes() / 7
    assert full.average_bytes() == pytest.approx(full.kv_bytes / 2, rel=0.01)
    assert replace(full, whole=True).average_bytes() == full.kv_bytes
    assert 2 < full.predict(device) / few.predict(device) < 8
    assert find_largest_batch(few, 141e9) > 12 * find_largest_batch(full, 141e9)
    assert find_largest_batch(full, 1e9) == 0


def test_a_plan_says_what_fits(capsys):
    plan("llamagen-xl", "line_ar-4lines", "h200", 64, 256)
    printed = capsys.readouterr().out
    assert "does not fit" in printed.splitlines()[1]
    assert "of 64 lines fits beside 256 images" in printed
    plan("llamagen-3b", "full", "t4", 24, 3000)
    assert "no cache fits beside 3000 images" in capsys.readouterr().out
    with pytest.raises(FewlinesError, match="unknown device 'tpu'; write this, h200"):
        plan("llamagen-b", "full", "tpu")
    with pytest.raises(FewlinesError, match="cache 'linear=4' is not one of full, line_ar-3lines"):
        plan("llamagen-b", "linear=4", "h200")
    with pytest.raises(FewlinesError, match="unknown shape 'llama'; there are llamagen-b"):
        plan("llama", "full", "h200")


def test_exponents_are_fitted_over_grids():
    rows = [
        {
            "shape": "s", "batch": 1, "dtype": "float32", "storage": "float32", "engine": "lean",
            "policy": "full", "budget": "all", "outcome": "ok", "memory_cap": None,
            "grid": f"{side}x{side}", "n_tokens": side**2,
            "seconds_per_image": 3.0 * side**4, "linear_seconds": side**2,
            "read_seconds": 0.0, "peak_bytes": 5.0 * side,
        }
        for side in (4, 8, 16)
    ]  # fmt: skip
    fitted = make_scaling_table(pd.DataFrame(rows)).iloc[0]
    assert fitted["time_exponent"] == pytest.approx(2)
    assert fitted["roofline_exponent"] == pytest.approx(1)
    assert fitted["memory_exponent"] == pytest.approx(0.5)
    assert len(make_scaling_table(pd.DataFrame(rows[:2]))) == 0


def test_grid_and_batch_settings_multiply():
    made = settings(grids=[4, 6], batches=[1, 2], caps=[1.5], storage="bfloat16")
    assert next(iter(made)) == "llamagen-b-4x4-batch1-float32-bfloat16"
    assert len(made) == 6
    capped = made["llamagen-b-6x6-1.5gb-float32-bfloat16"]
    lean, few = capped.rows[0], capped.rows[-1]
    assert few.batch > lean.batch
    assert (
        capped.predict(lean).process_bytes
        <= 1.5e9
        < capped.predict(replace(lean, batch=lean.batch + 1)).process_bytes
    )
