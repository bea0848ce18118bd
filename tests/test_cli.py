"""The stages as commands."""

from __future__ import annotations

import pytest

from fewlines.cli import main
from fewlines.files import read_json
from fewlines.stages import MODULES, load_stage


def test_a_stage_runs_by_hand(tiny_files):
    given = {name: name for name in ("config", "model", "tokens")} | {"output": "out.json"}
    options = [f"--{name}={tiny_files / file}" for name, file in given.items()]
    assert main(["measure-likelihood", "--cache=lines-1lines", *options]) == 0
    found = read_json(tiny_files / "out.json")
    assert found["images"] == 6
    assert len(found["kl_by_line"]) == 4
    assert found["nll_delta_low"] <= found["nll_delta"] <= found["nll_delta_high"]


@pytest.mark.parametrize("stage", MODULES)
def test_every_stage_has_a_help_text(stage, capsys):
    assert load_stage(stage).__doc__
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    assert "--threads" in capsys.readouterr().out


def test_an_unknown_stage_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-modle"])
    assert stop.value.code == 2
    assert "train-model" in capsys.readouterr().err
