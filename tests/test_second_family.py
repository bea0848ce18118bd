"""A family from another package, a causal convolution: from images to report by Snakemake. What it
cannot do is absent from its plan."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import fewlines
from conftest import planned
from fewlines.decode.loop import decode
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.models.base import get_family
from fewlines.registry import discover
from toy_chain import TOY, make_folder, plan, snakemake

FAMILY = Path(__file__).parent / "family"


@pytest.fixture
def family(monkeypatch):
    """As if the package were installed, here and in every process that is started."""
    monkeypatch.syspath_prepend(str(FAMILY))
    path = f"{FAMILY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    discover.cache_clear()
    yield get_family("causal-convolution")
    discover.cache_clear()


def test_its_state_draws_what_its_parallel_forward_finds_likeliest(family):
    shape = family.Shape(channels=8, reach=6, codes=9, classes=2, grid=(3, 4))
    model = family(shape).requires_grad_(False)
    model.initialise(torch.Generator().manual_seed(0))
    labels, noise = torch.tensor([0, 1, 2]), draw_noise(0, range(3), 12)
    drawn = decode(model, labels, noise, fewlines.cache("full"), Sampler(top_k=1))
    expected = model.teacher_forced(labels, drawn).argmax(-1)
    assert torch.equal(drawn, expected)
    with pytest.raises(fewlines.FewlinesError, match="has no key-value cache; write policy: full"):
        model.limit(fewlines.cache("lines", lines=1))


def test_it_goes_from_images_to_report_without_what_it_cannot_do(family, tmp_path):
    experiment = yaml.safe_load(TOY.read_text()) | {"name": "convolution"}
    experiment["architectures"] = {}
    experiment["model"] = {"family": "causal-convolution", "channels": 16, "steps": 40, "batch": 8}
    config = tmp_path / "convolution.yaml"
    config.write_text(yaml.safe_dump(experiment))
    folder = tmp_path / "run"
    make_folder(folder)
    jobs = planned(plan(folder, "-n", config=config))
    assert jobs == {
        "data": 1, "tokenizer": 1, "classifier": 1, "tokens": 1, "model": 1, "model_test": 1,
        "generate": 2, "samples": 1, "quality": 1, "likelihood": 1, "cost": 1,
        "reference_scores": 1, "tables": 1, "figures": 1, "report": 1,
    }  # fmt: skip
    snakemake(folder, config=config)
    run = folder / "results/convolution"
    (row,) = pd.read_csv(run / "tables/cache.csv").to_dict("records")
    assert (row["model"], row["policy"]) == ("base", "full")
    assert row["nll"] < 3.4  # less than log 32: it has learned
    assert row["kv_bytes"] == 4 * 20 * 16 * 4  # batch, reach, channels, float32
    assert row["seconds_per_image"] > 0
    assert row["fid_mean"] > 0
    assert "nats/token" in (run / "report.html").read_text()
