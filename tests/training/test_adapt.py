"""Adaptation: the limited model learns, and only what it was told to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import fewlines
from fewlines.attention.attend import attend_causally
from fewlines.attention.line_parallel import attend_under
from fewlines.config import validate_experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_tensors
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.settings import LlamaGenSettings
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.stages.models import adapt, train_model
from fewlines.training.loop import make_generator, train
from fewlines.training.model import ModelObjective

SHAPE = TransformerShape(16, 2, 2, 2, codes=7, classes=4, grid=(3, 4), multiple_of=16)
LABELS = torch.arange(64) % 4
CODES = torch.randint(7, (64, 12), generator=torch.Generator().manual_seed(0))
CODES[:, 6:] = CODES[:, :6]  # what a small cache has let go


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Transformer:
    network = Transformer(SHAPE)
    network.initialise(make_generator(0, 0))
    return continued(network, 120, [None], tmp_path_factory.mktemp("base"))


def continued(network, steps, attends, folder, trained="") -> Transformer:
    settings = LlamaGenSettings(dim=16, layers=2, heads=2, steps=steps, batch=16, warmup=2)
    network = copy.deepcopy(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained in name)
    task = ModelObjective(settings, network, LABELS, CODES, 5, memories=attends)
    train(task, "test", folder, 1e9)
    return network


def limited(policy: str, **options):
    return attend_under(fewlines.cache(policy, **options).plan(SHAPE.geometry))


@torch.no_grad()
def loss(network: Transformer, attend) -> float:
    logits = network.teacher_forced(LABELS, CODES, attend)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), CODES.flatten()).item()


@pytest.mark.parametrize(
    "cache", [("streaming", {"sinks": 1, "merge": True}), ("line_ar", {"anchor": 1, "recent": 0})]
)
def test_adaptation_helps_under_the_cache_more_than_as_many_steps_without(base, cache, tmp_path):
    """Scoring policies too: gradients flow through the line-parallel forward."""
    policy, options = cache
    attend = limited(policy, lines=1, **options)
    adapted = continued(base, 60, [attend], tmp_path / "adapted")
    steps = continued(base, 60, [None], tmp_path / "steps")
    assert loss(adapted, attend) < loss(steps, attend) - 0.02
    assert loss(adapted, attend) < loss(base, attend) - 0.02


def write_tokens(folder: Path, grid: tuple[int, int]) -> Path:
    tensors = {"train_codes": CODES, "train_labels": LABELS}
    tensors |= {"test_codes": CODES.flip(0), "test_labels": LABELS.flip(0)}
    path = folder / f"tokens-{grid[0]}x{grid[1]}.safetensors"
    write_tensors(path, tensors, {"grid": grid, "codes": 7, "classes": 4})
    return path


def test_from_scratch_means_as_the_base_model_was_trained(tmp_path):
    """With a full cache, the same weights, bit for bit; with a small one, others."""
    models = {
        "scratch:full": {"caches": ["full"], "start": "scratch"},
        "scratch:2lines": {"caches": ["lines-2lines"], "start": "scratch"},
    }
    experiment = validate_experiment(
        {
            "model": {"dim": 16, "layers": 2, "heads": 2, "steps": 4, "batch": 8},
            "adaptation": {"models": models},
            "paper": {"caches": ["lines-2lines"]},
            "caches": [{"policy": "full"}, {"policy": "lines", "budget": {"lines": 2}}],
        }
    )
    tokens = write_tokens(tmp_path, (3, 4))
    base, metrics = tmp_path / "base.safetensors", tmp_path / "metrics.json"
    train_model(experiment, tokens, base, metrics)
    for name in models:
        adapt(experiment, base, tokens, name, tmp_path / f"{name}.safetensors", metrics)
    full, few = ((tmp_path / f"{name}.safetensors").read_bytes() for name in models)
    assert full == base.read_bytes()
    assert few != base.read_bytes()
    assert experiment.find_baseline("scratch:2lines") == "base"


def test_training_goes_on_from_weights_of_another_grid_and_no_other_shape(tmp_path):
    settings = {"dim": 16, "layers": 2, "heads": 2, "steps": 4, "batch": 8}
    first, second, metrics = (tmp_path / name for name in ("first", "second", "metrics"))
    train_model(
        validate_experiment({"model": settings}), write_tokens(tmp_path, (3, 4)), first, metrics
    )
    wide = write_tokens(tmp_path, (2, 6))
    slow = {"start": first, "steps": 1, "muon_rate": 1e-12, "adamw_rate": 1e-12}
    train_model(validate_experiment({"model": settings | slow}), wide, second, metrics)
    begun, went_on = (load_network(path, Transformer) for path in (first, second))
    assert went_on.shape.grid == (2, 6)
    torch.testing.assert_close(went_on.state_dict(), begun.state_dict(), atol=1e-6, rtol=0)
    deeper = validate_experiment({"model": settings | {"start": first, "layers": 3}})
    with pytest.raises(
        FewlinesError, match="has layers 2, this experiment layers 3; only the grid"
    ):
        train_model(deeper, wide, second, metrics)


@pytest.mark.parametrize("family", ["gated-deltanet", "hierarchical"])
def test_a_family_that_learns_places_goes_on_on_the_same_grid_alone(tmp_path, family):
    settings = {"family": family, "dim": 16, "layers": 1, "heads": 2, "steps": 1, "batch": 8}
    first, metrics = tmp_path / "first", tmp_path / "metrics"
    tokens = write_tokens(tmp_path, (3, 4))
    train_model(validate_experiment({"model": settings}), tokens, first, metrics)
    goes_on = validate_experiment({"model": settings | {"start": first}})
    train_model(goes_on, tokens, tmp_path / "second", metrics)
    with pytest.raises(FewlinesError, match="learns each place of a grid, so leave out start"):
        train_model(goes_on, write_tokens(tmp_path, (2, 6)), tmp_path / "second", metrics)


def test_a_model_is_compared_with_as_many_steps_by_the_same_loss():
    full, few = {"caches": ["full"]}, {"caches": ["lines-2lines"]}
    models = {
        "base+steps": full,
        "base+steps:distilled": full | {"distil": 0.5},
        "base+steps:9": full | {"steps": 9},
        "adapted": few,
        "adapted:distilled": few | {"distil": 0.5},
        "adapted:9": few | {"steps": 9, "distil": 0.5},
        "adapted:5": few | {"steps": 5},
    }
    caches = [{"policy": "full"}, {"policy": "lines", "budget": {"lines": 2}}]
    adaptation, paper = {"models": models}, {"caches": ["lines-2lines"]}
    experiment = validate_experiment({"adaptation": adaptation, "paper": paper, "caches": caches})
    found = {name: experiment.find_baseline(name) for name in models if name.startswith("adapted")}
    assert found == {
        "adapted": "base+steps",
        "adapted:distilled": "base+steps:distilled",
        "adapted:9": "base+steps:9",
        "adapted:5": "base+steps",
    }
    unseen = {"base+steps": few, "adapted": few}  # whose full cache is not measured
    adaptation = {"models": unseen}
    experiment = validate_experiment({"adaptation": adaptation, "paper": paper, "caches": caches})
    assert experiment.find_baseline("adapted") is None


def test_only_the_chosen_parameters_change(base, tmp_path):
    adapted = continued(base, 5, [None], tmp_path, trained="norm")
    for (name, before), after in zip(base.named_parameters(), adapted.parameters(), strict=True):
        assert torch.equal(before, after) == ("norm" not in name), name


@pytest.mark.parametrize("trained", ["all", "attention"])
def test_low_rank_updates_are_merged_into_plain_weights(base, tmp_path, trained):
    """Only matrices of what was named change, by an update of that rank; the file is a plain
    model's."""
    model = {"caches": ["lines-1lines"], "trained": trained, "rank": 2, "steps": 4}
    experiment = validate_experiment(
        {
            "adaptation": {"batch": 8, "models": {"adapted": model}},
            "paper": {"caches": ["lines-1lines"]},
            "caches": [{"policy": "full"}, {"policy": "lines", "budget": {"lines": 1}}],
        }
    )
    tokens, start = tmp_path / "tokens.safetensors", tmp_path / "base.safetensors"
    codes = {"train_codes": CODES, "train_labels": LABELS}
    codes |= {"test_codes": CODES.clone(), "test_labels": LABELS.clone()}
    write_tensors(tokens, codes, {"grid": [3, 4], "codes": 7, "classes": 4})
    save_network(start, base)
    adapt(experiment, start, tokens, "adapted", tmp_path / "adapted", tmp_path / "metrics")
    adapted = load_network(tmp_path / "adapted", Transformer)
    for (name, before), after in zip(base.named_parameters(), adapted.parameters(), strict=True):
        matrix = before.ndim == 2 and ("layers" in name or name == "output.weight")
        expected = matrix and (trained == "all" or "attention" in name)
        assert torch.equal(before, after) != expected, name
        if expected:
            assert torch.linalg.matrix_rank(after - before, rtol=1e-3) == 2, name
    adapt(experiment, start, tokens, "adapted", tmp_path / "again", tmp_path / "metrics")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "adapted").read_bytes()


def test_distillation_draws_to_the_teacher(base, tmp_path):
    """The loss is KL to the teacher, and it falls: with images that the teacher finds unlikely."""
    noise = torch.randint(7, CODES.shape, generator=torch.Generator().manual_seed(1))
    settings = LlamaGenSettings(dim=16, layers=2, heads=2, steps=60, batch=64, warmup=2)
    student = Transformer(SHAPE)
    student.initialise(make_generator(1, 0))
    task = ModelObjective(settings, student, LABELS, noise, 5, teacher=base, distil=1.0)
    before = task.compute_loss(0).item()
    train(task, "test", tmp_path, 1e9)
    assert task.compute_loss(0).item() < before / 3


def test_one_of_several_caches_is_drawn_for_every_step(base):
    drawn = []

    def attend(number):
        def inner(layer, q, k, v):
            if layer == 0:
                drawn.append(number)
            return attend_causally(layer, q, k, v)

        return inner

    settings = LlamaGenSettings(dim=16, layers=2, heads=2, steps=40, batch=4, warmup=2)
    attends = [attend(number) for number in range(3)]
    task = ModelObjective(settings, copy.deepcopy(base), LABELS, CODES, 5, memories=attends)
    for step in range(40):
        task.compute_loss(step)
    assert sorted(set(drawn)) == [0, 1, 2]
    assert min(drawn.count(number) for number in range(3)) > 5
    first = list(drawn)
    drawn.clear()
    for step in range(40):
        task.compute_loss(step)
    assert drawn == first
