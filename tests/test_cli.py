"""What a user sees who gives the wrong thing: one sentence, a non-zero exit, nothing written."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_transformer
from fewlines.cli import main
from fewlines.files import read_json, write_tensors
from fewlines.models.checkpoint import save_network
from fewlines.stages import MODULES, load_stage

CONFIG = """
name: tiny
caches:
  - {policy: full}
  - {policy: streaming, budget: {lines: 3}}
  - {policy: lines, budget: {lines: 1}}
paper: {cache: lines-1lines}
sampling: {samples: 4, seeds: [0]}
quality: {kid_subset_size: 2}
likelihood: {images: 6, batch: 4}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def files(tmp_path):
    """A tiny model and tokens that fit it."""
    save_network(tmp_path / "model.safetensors", tiny_transformer())
    codes = torch.randint(16, (8, 20), generator=torch.Generator().manual_seed(0))
    write_tensors(
        tmp_path / "tokens.safetensors",
        {"test_codes": codes, "test_labels": torch.arange(8) % 3},
        {"grid": (4, 5), "codes": 16, "classes": 3},
    )
    return tmp_path


def likelihood(config, files, cache="lines-1lines", model="model", tokens="tokens"):
    return main(
        [
            "measure-likelihood", "--config", str(config),
            "--model", str(files / f"{model}.safetensors"),
            "--tokens", str(files / f"{tokens}.safetensors"),
            "--cache", cache, "--output", str(files / "out.json"),
        ]
    )  # fmt: skip


def test_a_stage_runs_by_hand(config, files):
    assert likelihood(config, files) == 0
    found = read_json(files / "out.json")
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
