"""The whole chain at toy size, through Snakemake, as a user runs it."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from conftest import planned
from fewlines.config import validate_experiment
from fewlines.files import read_json
from fewlines.report.provenance import make_stamp_here
from fewlines.stages.networks import train_tokenizer
from fewlines.stages.publish import publish
from fewlines.stages.report import figures, report, tables
from toy_chain import REPOSITORY, TOY, plan, snakemake

CACHE_COLUMNS = [
    "model", "policy", "budget", "capacity", "n_tokens", "samples", "seeds",
    "nll", "nll_delta", "nll_delta_low", "nll_delta_high", "kl",
    "fid_mean", "fid_sd", "kid_mean", "is_mean", "precision", "recall",
    "kv_bytes", "peak_bytes", "seconds_per_image", "speedup_lean", "speedup_stock", "memory_saving",
]  # fmt: skip


def test_every_table_figure_and_report_is_there(run):
    table = pd.read_csv(run / "tables/cache.csv")
    assert list(table.columns[: len(CACHE_COLUMNS)]) == CACHE_COLUMNS
    full, few, scheduled, ranked, steps, adapted, compared = table.to_dict("records")
    assert (full["policy"], full["budget"]) == ("full", "all")
    assert (few["policy"], few["budget"], few["capacity"]) == ("streaming", "lines: 3", 43)
    assert (scheduled["policy"], scheduled["capacity"]) == ("scheduled+merge", 29)
    assert full["nll_delta"] == full["kl"] == 0
    assert (ranked["policy"], ranked["kv_bytes"]) == ("line_ar", scheduled["kv_bytes"])
    assert np.isnan([ranked["fid_mean"], ranked["seconds_per_image"]]).all()
    assert (steps["model"], steps["policy"], steps["steps_delta"]) == ("base+steps", "full", 0)
    assert steps["nll"] < full["nll"]
    assert (adapted["model"], adapted["policy"]) == ("adapted:2lines", "scheduled+merge")
    assert (compared["model"], compared["policy"]) == ("adapted:2lines", "line_ar")
    assert adapted["steps_delta"] == pytest.approx(adapted["nll"] - steps["nll"], abs=1e-5)
    assert few["kv_bytes"] * 197 == full["kv_bytes"] * 43
    paper = pd.read_csv(run / "tables/paper.csv")
    assert paper["cache"].tolist() == [
        "Baseline (Full Cache)", "Proposed (Few Lines Cache)",
        "full, stock", "full, lean", "scheduled+merge-2lines", "scheduled+merge-2lines",
    ]  # fmt: skip
    assert paper["model"].tolist()[2:] == ["base", "base", "base", "adapted:2lines"]
    assert paper["grid"].tolist()[2:] == ["14x14"] * 4
    assert paper["fid_mean"].notna().all()
    few = paper["cache"] == "scheduled+merge-2lines"
    assert (paper.loc[few, ["time_ratio", "time_ratio_stock"]] > 0).all(axis=None)
    assert (paper.loc[few, "kv_memory_ratio"] > 1).all()
    assert paper.loc[~few, "time_ratio"].notna().tolist() == [False, True, False, False]
    large = pd.read_csv(run / "tables/efficiency.csv")
    assert large["policy"].tolist() == ["full", "full", "streaming"]
    assert large["grid"].tolist() == ["6x6"] * 3
    few = large["policy"] == "streaming"
    assert (large.loc[few, ["speedup_lean", "speedup_stock"]] > 0).all(axis=None)
    assert (large.loc[few, "memory_saving_lean"] > 1).all()
    storage = pd.read_csv(run / "tables/storage.csv").set_index("storage")
    assert storage.loc["float16", "equal_tokens"] > 0.9
    assert storage["nll_delta"].abs().max() < 0.01
    lines = pd.read_csv(run / "tables/lines.csv")
    assert lines.groupby(["model", "policy", "budget"]).size().eq(14).all()
    regions = pd.read_csv(run / "tables/regions.csv")
    assert regions.groupby("line")["attention"].sum().round(4).eq(1).all()
    for name in (
        "cache", "correlations", "ranks", "paper", "reference-scores", "storage", "efficiency",
    ):  # fmt: skip
        for suffix in (".md", ".tex"):
            assert (run / f"tables/{name}{suffix}").stat().st_size > 100
    assert (run / "figures/watch.gif").read_bytes().startswith(b"GIF89a")
    assert "data:image/png;base64," in (run / "watch.html").read_text()
    for name in ("quality", "samples", "memory", "lines", "curves", "heads"):
        assert (run / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(run / f"figures/{name}.csv")) > 1
    assert (run / "figures/efficiency.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 12  # each for light and dark pages
    assert "streaming" in page
    assert "http" not in page
    assert read_json(run / "provenance.json")["precision"] == "float32"
    assert read_json(run / "provenance.json")["images"] == "drawn on the spot"


def test_a_second_run_does_nothing(own_folder):
    assert "Nothing to be done" in plan(own_folder)


def test_a_new_cache_runs_only_its_own_jobs(folder, tmp_path):
    experiment = yaml.safe_load(TOY.read_text())
    several = {"policy": "scheduled", "budget": {"lines": 2}, "merge": True, "allocation": "bands"}
    experiment["caches"].append({"policy": "lines", "budget": {"tokens": 21}})
    experiment["caches"].append({**several, "measure": "likelihood"})
    config = tmp_path / "more.yaml"
    config.write_text(yaml.safe_dump(experiment))
    jobs = planned(plan(folder, "-n", config=config))
    assert jobs == {
        "generate": 2, "samples": 1, "quality": 1, "likelihood": 2, "cost": 1,
        "bands": 1, "tables": 1, "lines_table": 1, "figures": 1, "report": 1,
        "paper_table": 1, "architectures": 1,
    }  # fmt: skip


def test_a_new_adaptation_and_a_new_task_run_only_their_own_jobs(folder, tmp_path):
    experiment = yaml.safe_load(TOY.read_text())
    adapted = {"caches": ["full", "scheduled+merge-2lines"], "trained": "norms"}
    experiment["adaptation"]["models"]["adapted"] = adapted
    guided = {"model": "adapted", "guidance": 2.0, "caches": ["full"]}
    experiment["tasks"] = {"completion": {"prompt_lines": 3, "caches": ["full"]}, "guided": guided}
    config = tmp_path / "more.yaml"
    config.write_text(yaml.safe_dump(experiment))
    assert planned(plan(folder, "-n", config=config)) == {
        "adapt": 1, "generate": 8, "samples": 4, "quality": 4, "likelihood": 3,
        "tables": 1, "lines_table": 1, "figures": 1, "report": 1,
        "paper_table": 1, "architectures": 1,
    }  # fmt: skip


def test_every_architecture_stands_beside_the_transformers_caches(run):
    table = pd.read_csv(run / "tables/architectures.csv").set_index("model")
    others = list(yaml.safe_load(TOY.read_text())["architectures"])
    adapted = ["base+steps", "adapted:2lines", "adapted:2lines"]
    assert table.index.tolist() == ["base"] * 4 + adapted + others
    steps = table.loc["base", "steps"].iloc[0]  # of all training
    assert (table.loc["adapted:2lines", "steps"] == steps + 12).all()
    assert (table.loc["adapted:2lines", "resident_bytes"] < table["resident_bytes"].iloc[0]).all()
    assert (table.loc[others, "nll"] < np.log(32)).all()  # they have learned
    assert (table.loc[others, "nll_delta"] > 0).all()  # of a base model that was trained for longer
    assert (table.loc[others, "read_bytes"] <= table.loc[others, "resident_bytes"]).all()
    assert (table.loc[others, "resident_bytes"] < table["resident_bytes"].iloc[0]).all()
    assert (table.loc[others, ["seconds_per_image", "naive_seconds_per_image"]] > 0).all(axis=None)
    assert table.loc[others, "fid_mean"].notna().all()
    assert (run / "figures/architectures.png").read_bytes().startswith(b"\x89PNG")
    shown = pd.read_csv(run / "figures/architectures-samples.csv")
    assert set(others) < set(shown["model"])


def test_what_no_run_makes_by_itself_is_made_when_it_is_asked_for(own_folder, tmp_path):
    tables = own_folder / "results/toy/tables"
    other = pd.read_csv(tables / "cache.csv")
    height, width = map(int, other["grid"][0].split("x"))
    other = other.assign(grid=f"{height}x{2 * width}", capacity=other["capacity"] * 3)
    other.to_csv(tmp_path / "other.csv", index=False)
    content = yaml.safe_load(TOY.read_text()) | {"grids": [str(tmp_path / "other.csv")]}
    (tmp_path / "grids.yaml").write_text(yaml.safe_dump(content))
    snakemake(own_folder, "neighbours", "grids", config=tmp_path / "grids.yaml")
    near = pd.read_csv(tables / "neighbours.csv")
    assert sorted(near["images"]) == ["drawn", "drawn", "test", "test"]
    assert (near["smallest"] > 0).all()
    lost = pd.read_csv(tables.parent / "figures/grids.csv")
    assert lost["grid"].nunique() == 2
    (tmp_path / "other.csv").unlink()
    said = plan(own_folder, "-n", "grids", config=tmp_path / "grids.yaml", status=1)
    assert f"grids.0: {tmp_path / 'other.csv'} does not exist" in said


def test_tables_and_report_are_made_again_without_measuring(own_folder):
    run = own_folder / "results/toy"
    before = (run / "tables/cache.csv").read_bytes()
    (run / "tables/cache.csv").unlink()
    (run / "report.html").unlink()
    done = snakemake(own_folder, "tables", "report")
    assert set(re.findall(r"^(?:local)?rule (\w+):", done, re.MULTILINE)) == {"tables", "report"}
    assert (run / "tables/cache.csv").read_bytes() == before
    assert (run / "report.html").exists()


def test_a_report_needs_no_two_policies_of_one_budget(run, tmp_path):
    """As `make quick` has them."""
    experiment = yaml.safe_load(TOY.read_text())
    experiment["caches"] = experiment["caches"][0:3:2]
    del experiment["adaptation"]["models"]["adapted:2lines"]["compared"]
    config = validate_experiment(experiment)
    few = tmp_path / "toy"
    shutil.copytree(run, few, ignore=shutil.ignore_patterns("*.checkpoints"))
    tables(config, few)
    figures(config, few)
    report(config, few, run / "tokens.safetensors", tmp_path / "report.html", tmp_path / "x.json")
    assert pd.read_csv(few / "tables/ranks.csv")["behind"].isna().all()
    assert "scheduled+merge" in (tmp_path / "report.html").read_text()


def test_likelihoods_alone_need_no_samples(own_folder, tmp_path):
    experiment = yaml.safe_load(TOY.read_text())
    experiment["caches"].append({"policy": "line_ar", "budget": {"lines": 1}})
    config = tmp_path / "more.yaml"
    config.write_text(yaml.safe_dump(experiment))
    jobs = planned(plan(own_folder, "-n", "likelihood_table", config=config))
    assert jobs == {"likelihood": 1, "likelihood_table": 1}
    snakemake(own_folder, "likelihood_table", config=config)
    table = pd.read_csv(own_folder / "results/toy/tables/likelihood.csv")
    assert table["policy"].tolist()[:5] == [
        "full",
        "streaming",
        "scheduled+merge",
        *["line_ar"] * 2,
    ]
    assert (table["nll_delta_low"] <= table["nll_delta"]).all()


def test_a_trained_tokenizer_is_taken_as_it_is(folder, run, tmp_path):
    """And judged on these images, as after training."""
    experiment = validate_experiment({"tokenizer": {"weights": run / "tokenizer.safetensors"}})
    output, metrics = tmp_path / "tokenizer.safetensors", tmp_path / "tokenizer.json"
    train_tokenizer(experiment, folder / "results/data/shapes.safetensors", output, metrics)
    assert output.read_bytes() == (run / "tokenizer.safetensors").read_bytes()
    then, now = (read_json(path) for path in (run / "tokenizer.json", metrics))
    assert now == then | {"seconds_per_step": 0}


def test_the_readmes_five_lines_run(folder, monkeypatch):
    code, _ = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, torch.Tensor] = {}
    exec(code.replace("fashion-mnist", "toy"), names)
    assert names["images"].shape == (3, 1, 28, 28)
    assert names["images"].dtype == torch.uint8


def test_a_finished_run_is_published_with_its_origin(run, tmp_path):
    published = {"mine/{name}.csv": "tables/cache.csv", "curves.png": "figures/curves.png"}
    config = validate_experiment(yaml.safe_load(TOY.read_text()) | {"publish": published})
    publish(config, run, tmp_path)
    table = pd.read_csv(tmp_path / "mine/toy.csv", dtype={"commit": str})  # of digits, now and then
    whole = pd.read_csv(run / "tables/cache.csv")
    assert table["policy"].tolist() == whole["policy"].tolist()
    stamp = make_stamp_here()
    assert read_json(run / "provenance.json")["measured"] == stamp
    assert set(table["commit"].fillna("")) == {stamp["commit"]}
    assert set(table["machine"]) == {stamp["machine"]}
    assert set(table["versions"]) == {stamp["versions"]}
    assert (tmp_path / "curves.png").read_bytes() == (run / "figures/curves.png").read_bytes()


def test_the_publishing_rule_asks_for_what_is_published(folder, tmp_path):
    experiment = yaml.safe_load(TOY.read_text())
    experiment["publish"] = {"mine.csv": "tables/likelihood.csv"}
    config = tmp_path / "publish.yaml"
    config.write_text(yaml.safe_dump(experiment))
    jobs = planned(plan(folder, "-n", "publish", config=config))
    assert jobs["publish"] == 1
    assert set(jobs) <= {"publish", "likelihood_table"}
