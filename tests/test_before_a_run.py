"""What is planned, and what is refused, where nothing has run yet."""

from __future__ import annotations

import pytest
import yaml

from conftest import planned
from fewlines.cli import main
from toy_chain import REPOSITORY, TOY, make_folder, plan


@pytest.fixture
def fresh(tmp_path):
    """A folder that sees the workflow, without results."""
    make_folder(tmp_path / "fresh")
    return tmp_path / "fresh"


def test_the_classifier_is_trained_only_where_images_are_compared_by_it(fresh, tmp_path):
    experiment = yaml.safe_load(TOY.read_text()) | {"name": "elsewhere"}
    config = tmp_path / "features.yaml"
    config.write_text(yaml.safe_dump(experiment))
    assert planned(plan(fresh, "-n", config=config))["classifier"] == 1
    experiment["quality"] = {**experiment["quality"], "features": "efficientnet-lite0"}
    config.write_text(yaml.safe_dump(experiment))
    assert "classifier" not in planned(plan(fresh, "-n", config=config))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("batch: 8, warmup", "bach: 8, warmup", "model.bach: unknown key; did you mean 'batch'?"),
        ("model: {", "model: {start: gone, ", "model.start: gone does not exist; this experiment"),
    ],
)
def test_a_wrong_configuration_stops_before_any_work(fresh, tmp_path, right, wrong, message):
    config = tmp_path / "wrong.yaml"
    config.write_text(TOY.read_text().replace(right, wrong, 1))
    assert message in plan(fresh, config=config, status=1)
    assert not (fresh / "results").exists()


def test_a_stage_that_fails_is_the_job_that_failed(fresh, tmp_path):
    """Its sentence is shown, and nobody waits for files that will not come."""
    (tmp_path / "empty").mkdir()
    experiment = yaml.safe_load(TOY.read_text()) | {"name": "failing"}
    experiment["data"] = {"source": "folder", "path": str(tmp_path / "empty")}
    config = tmp_path / "failing.yaml"
    config.write_text(yaml.safe_dump(experiment))
    output = plan(fresh, "--retries", "0", "--until", "data", config=config, status=1)
    assert "holds no images" in output
    assert "MissingOutputException" not in output


def test_publishing_a_run_that_is_not_finished_is_refused(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    command = ["publish", f"--config={config}", f"--run={tmp_path}", f"--reference={tmp_path}"]
    config.write_text("publish: {mine.csv: tables/likelihood.csv}")
    assert main(command) == 2
    assert "tables/likelihood.csv is missing; finish the run" in capsys.readouterr().err
    config.write_text("{}")
    assert main(command) == 2
    assert "says nothing under 'publish'" in capsys.readouterr().err


def test_the_snakemake_report_is_described():
    """Every table and figure has a caption and a place in `snakemake --report`."""
    captions = {path.stem for path in (REPOSITORY / "workflow/report").glob("*.rst")}
    assert captions == {
        "architectures", "cache", "correlations", "ranks", "regions", "paper", "reference-scores",
        "storage",
        "quality", "samples", "memory", "lines", "curves", "heads", "efficiency", "watch",
    }  # fmt: skip
