"""What a stage leaves that was killed and tried again: the bytes of one that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewlines.cli import main
from fewlines.files import read_json, read_tensors
from toy_chain import KILLS, OF_ALL


def test_it_was_under_fire(folder, record_property):
    killed = (folder / "killed").read_text().splitlines()
    assert len(killed) == KILLS
    assert killed.count("snakemake") == len(OF_ALL)
    assert len({command.split()[0] for command in killed if command != "snakemake"}) > 5
    record_property("kills", len(killed))


STAGES = {
    "train-tokenizer": (
        "--images {data} --output {out}/tokenizer.safetensors --metrics {out}/tokenizer.json"
    ),
    "train-model": (
        "--tokens {run}/tokens.safetensors --output {out}/base/model.safetensors "
        "--metrics {out}/base/model.json"
    ),
    "calibrate": (
        "--model {run}/base/model.safetensors --tokens {run}/tokens.safetensors "
        "--output {out}/base/calibration.safetensors"
    ),
    "adapt": (
        "--model {run}/base/model.safetensors --tokens {run}/tokens.safetensors "
        "--calibration {run}/base/calibration.safetensors --name adapted:2lines "
        "--output {out}/adapted:2lines/model.safetensors "
        "--metrics {out}/adapted:2lines/model.json"
    ),
    "generate": (
        "--model {run}/base/model.safetensors --calibration {run}/base/calibration.safetensors "
        "--cache scheduled+merge-2lines --shard 0 --output {out}/shard.safetensors"
    ),
    "measure-quality": (
        "--samples {run}/base/samples/scheduled+merge-2lines.safetensors --images {data} "
        "--tokenizer {run}/tokenizer.safetensors --classifier {run}/classifier.safetensors "
        "--output {out}/base/quality/scheduled+merge-2lines.json"
    ),
    "measure-likelihood": (
        "--model {run}/base/model.safetensors --tokens {run}/tokens.safetensors "
        "--cache streaming-3lines --output {out}/base/likelihood/streaming-3lines.json"
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_killed_ends_with_the_bytes_of_an_undisturbed_stage(folder, run, stage, tmp_path):
    places = {"data": folder / "results/data/shapes.safetensors", "run": run, "out": tmp_path}
    options = STAGES[stage].format(**places).split()
    config = ["--config", str(run / "experiment.yaml")]
    # As many threads as in the whole run: sums of floats depend on how they are split.
    assert main([stage, *config, "--threads", "1", *options]) == 0
    for path in (Path(word) for word in options if word.startswith(str(tmp_path))):
        compare(path, run, tmp_path)


RATES = ("training_flops_per_second", "gemm_flops_per_second", "gemm_share")


def compare(path: Path, run: Path, out: Path) -> None:
    """A stage's output is that of the uninterrupted run."""
    if path.name == "shard.safetensors":
        tensors, _ = read_tensors(path)
        whole, _ = read_tensors(run / "base/samples/scheduled+merge-2lines.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole[name][: len(tensor)])
    elif path.suffix == ".json" and path.with_suffix(".safetensors").exists():  # of a training
        one, other = read_json(path), read_json(run / path.relative_to(out))
        for key in one.keys() - {"seconds_per_step", *RATES}:
            assert one[key] == other[key], key
    else:
        assert path.read_bytes() == (run / path.relative_to(out)).read_bytes()
