"""The same batch gives the same steps, however many processes it is spread over."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from spread_tasks import DIVIDED, HALF, STEPS, TASKS, make_model, make_tokenizer, run

from fewlines.attention.teacher_forced import TeacherForced, leave_uncompiled
from fewlines.config import validate_experiment
from fewlines.errors import FewlinesError
from fewlines.files import read_json, read_tensors
from fewlines.models.base import TokenSpec, get_family
from fewlines.models.pixelcnn import PixelCNNSettings
from fewlines.training.loop import take_step
from fewlines.training.parallel import Share, divide, read_weights, spread

TORCHRUN = Path(sys.executable).with_name("torchrun")
SCRIPT = Path(__file__).with_name("spread_tasks.py")
CLOSE = {"rtol": 2e-3, "atol": 2e-5}  # Muon makes a sign of what is nearly zero


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """All tasks in two processes, which share this machine by gloo."""
    folder = tmp_path_factory.mktemp("two")
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*TASKS, *DIVIDED])
def test_two_processes_take_the_steps_of_one(two, tmp_path, name):
    make, _ = TASKS.get(name, (make_model, 1))  # one process divides nothing
    task = make()
    losses = run(task, 1, tmp_path)
    assert read_json(two / "losses.json")[name] == pytest.approx(losses, rel=1e-4)
    weights, _ = read_tensors(two / f"{name}.safetensors")
    for key, tensor in task.network.state_dict().items():
        torch.testing.assert_close(
            weights[key], tensor, **CLOSE, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["model", "divided"])
def test_one_process_goes_on_from_two(two, tmp_path, name):
    whole = run(make_model(), 1, tmp_path / "whole")
    shutil.copytree(two / "halves" / name, tmp_path / "half")
    rest = run(make_model(), 1, tmp_path / "half")
    assert len(rest) == STEPS - HALF
    assert rest == pytest.approx(whole[HALF:], rel=1e-4)


@pytest.mark.parametrize("name", ["model", "divided"])
def test_two_processes_go_on_from_two(two, name):
    losses = read_json(two / "losses.json")
    assert losses[f"{name}, resumed"] == pytest.approx(losses[name][HALF:], rel=1e-4)


def test_shares_are_the_batch():
    rows = torch.arange(12)
    assert torch.equal(torch.cat([Share(part, 3).of(rows) for part in range(3)]), rows)


def test_a_batch_that_cannot_be_divided_is_said():
    with pytest.raises(FewlinesError, match="a batch of 8 has no 3 equal parts"):
        divide(8, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": {"shard": True}}, r"training\.shard: there is one process"),
        ({"training": {"gpus": 3}}, r"tokenizer\.batch: 128 images have no 3 equal parts"),
        (
            {"training": {"gpus": 8, "accumulate": 4}},
            r"model\.batch: 16 images have no 32 equal parts, .* write 32",
        ),
        (
            {
                "training": {"shard": True, "gpus": 2},
                "adaptation": {"models": {"adapted:a": {"caches": ["lines-3lines"], "rank": 4}}},
            },
            r"training\.shard: the update of low rank of adapted:a cannot be divided",
        ),
    ],
)
def test_settings_that_cannot_be_spread(content, message):
    with pytest.raises(FewlinesError, match=message):
        validate_experiment(content)


def test_a_network_without_layers_is_said():
    with pytest.raises(FewlinesError, match="a ConvTokenizer has no list of layers"):
        spread(make_tokenizer().network, "forward", divided=True, recompute=False)


def test_layers_that_are_not_computed_in_turn_are_said():
    network = get_family("pixelcnn")(PixelCNNSettings(layers=1).make_shape(TokenSpec((2, 2), 3, 2)))
    with pytest.raises(FewlinesError, match="layers of a PixelCNN are not computed one after"):
        spread(network, "teacher_forced", divided=False, recompute=True)


def test_layers_that_are_computed_again_keep_less():
    kept = {}
    for recompute in (False, True):
        task, held = make_model(recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, held=held: held.append(x.nbytes) or x, lambda x: x
        ):
            task.compute_loss(0)
        kept[recompute] = sum(held)
    assert kept[True] < kept[False] / 2
    assert read_weights(task.network).keys() == make_model().network.state_dict().keys()


def test_compiled_layers_take_the_same_steps_by_as_many_graphs_for_any_depth(monkeypatch):
    """By a backend that needs no compiler; two caches, one of them limited, take turns."""
    graphs: list[int] = []

    def count(graph, inputs):
        graphs[-1] += 1
        return graph

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(TeacherForced, "__call__", TeacherForced.__call__)  # to be put back
    leave_uncompiled()
    for layers in (2, 5):
        torch.compiler.reset()
        graphs.append(0)
        plain, compiled = make_model(layers=layers), make_model(compiled=True, layers=layers)
        for step in range(6):
            torch.testing.assert_close(take_step(compiled, step), take_step(plain, step))
    assert graphs[0] == graphs[1] > 0
    assert read_weights(compiled.network).keys() == plain.network.state_dict().keys()
