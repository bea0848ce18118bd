"""Published checkpoints and codes, at a tiny shape with random weights."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import GRID, planned, tiny_transformer
from fewlines.cli import main
from fewlines.files import read_tensors
from fewlines.models.checkpoint import load_network
from fewlines.models.llamagen.checkpoint import load_checkpoint
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import SHAPES, PublishedShape

REPOSITORY = Path(__file__).parent.parent.parent
MODEL = tiny_transformer(kv_heads=4)
CODES = np.arange(5 * 20).reshape(5, 1, 20) % 16


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`tiny` is a published shape whose models are as `tiny_transformer`'s."""
    made = PublishedShape(32, 2, 4, 16, GRID)
    monkeypatch.setattr(PublishedShape, "on", lambda self, grid: MODEL.shape)
    monkeypatch.setitem(SHAPES, "tiny", made)


def imported(path: Path, capsys) -> tuple[int, str]:
    out = path.parent / "model.safetensors"
    options = ["--shape=tiny", "--grid=4", f"--output={out}", f"--metrics={path.parent / 'm.json'}"]
    return main(["import-model", f"--checkpoint={path}", *options]), capsys.readouterr().err


@pytest.mark.parametrize("inside", [None, "model"])
def test_a_checkpoint_becomes_a_model_that_every_stage_reads(inside, tmp_path, capsys):
    weights = MODEL.state_dict()
    torch.save({inside: weights} if inside else weights, tmp_path / "c2i.pt")
    assert imported(tmp_path / "c2i.pt", capsys) == (0, "")
    found = load_network(tmp_path / "model.safetensors", Transformer)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    again = load_checkpoint(tmp_path / "model.safetensors", MODEL.shape)
    assert torch.equal(again.output.weight, MODEL.output.weight)


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = {**MODEL.state_dict(), **tensors}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(**{"norm.weight": None}), "lacks norm.weight"),
        (changed(freqs=torch.ones(2)), "has, beside the model's weights, freqs"),
        (changed(**{"norm.weight": torch.ones(3)}), r"norm.weight is \(3,\), not \(32,\)"),
        (changed(**{"norm.weight": torch.full((32,), torch.nan)}), "not finite"),
        (
            {"model": MODEL.state_dict(), "args": Namespace(lr=1)},
            "is not a whole file of weights alone",
        ),
        ({"step": 3}, "holds no weights by name"),
    ],
)
def test_what_is_no_such_checkpoint_is_named(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "c2i.pt")
    code, said = imported(tmp_path / "c2i.pt", capsys)
    assert code == 2
    assert re.search(message, said)
    assert not (tmp_path / "model.safetensors").exists()


def test_codes_become_tokens_and_wrong_ones_are_named(tmp_path, capsys):
    np.save(tmp_path / "codes.npy", CODES)
    np.save(tmp_path / "labels.npy", np.arange(5) % 3)

    def run(codes: str = "codes", labels: str = "labels") -> tuple[int, str]:
        files = {"codes": codes, "labels": labels}
        options = [
            f"--{split}-{name}={tmp_path / file}.npy"
            for split in ("train", "test")
            for name, file in files.items()
        ]
        options += ["--shape=tiny", "--grid=4", f"--output={tmp_path / 'tokens.safetensors'}"]
        return main(["import-tokens", *options]), capsys.readouterr().err

    assert run() == (0, "")
    tensors, header = read_tensors(tmp_path / "tokens.safetensors")
    assert tensors["test_codes"].tolist() == CODES[:, 0].tolist()
    assert header == {"grid": list(GRID), "codes": 16, "classes": 3}
    np.save(tmp_path / "short.npy", CODES[..., :9])
    np.save(tmp_path / "large.npy", CODES + 1)
    (tmp_path / "text.npy").write_text("codes")
    np.savez(tmp_path / "several.npz", CODES)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    np.save(tmp_path / "halves.npy", CODES.astype(np.float16))
    np.save(tmp_path / "words.npy", CODES.astype(str).astype("<U1"))
    for wrong, message in (
        ("short", "has 9 codes an image"),
        ("large", "must lie in 0 … 15"),
        ("text", "text.npy is not a .npy file of numbers"),
        ("several", "holds several arrays; save one"),
        ("halves", "holds float16 of shape"),
        ("words", "holds <U1 of shape"),
        ("nowhere", "No such file"),
    ):
        code, said = run(codes=wrong)
        assert code == 2
        assert message in said
    assert run(labels="codes")[0] == 2


def test_the_recipe_plans_without_images_or_a_tokenizer(tmp_path):
    for name in ("Snakefile", "workflow", "profiles", "config.yaml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "llamagen").mkdir()
    for name in ("tokens.safetensors", "c2i_B_256.pt"):
        (tmp_path / "llamagen" / name).touch()
    recipe = str(REPOSITORY / "experiments/llamagen.yaml")
    command = [str(Path(sys.executable).parent / "snakemake"), "-n", "likelihood_table"]
    done = subprocess.run(
        [*command, "--configfile", recipe], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = planned(done.stdout + done.stderr)
    assert set(jobs) == {"model", "calibration", "adapt", "likelihood", "likelihood_table"}
