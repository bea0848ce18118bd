from __future__ import annotations

import pytest
import torch

import fewlines
from fewlines.config.settings import ClassifierSettings
from fewlines.config.tokenizer import TokenizerSettings
from fewlines.errors import FewlinesError
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.settings import LlamaGenSettings
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.training.classifier import ClassifierObjective, measure_accuracy
from fewlines.training.loop import draw_rows, make_generator, scale_rate, train
from fewlines.training.model import ModelObjective
from fewlines.training.muon import Muon, orthogonalise
from fewlines.training.tokenizer import TokenizerObjective, evaluate_tokenizer

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (64, 1, 8, 8), generator=RANDOM, dtype=torch.uint8)
LABELS = torch.arange(64) % 4
CODES = torch.arange(12).repeat(64, 1) % 7


def transformer_task(
    steps: int = 12, codes: torch.Tensor = CODES, weights: int = 3, few: int | None = None
) -> ModelObjective:
    settings = LlamaGenSettings(dim=16, layers=2, heads=2, steps=steps, batch=5, warmup=2)
    shape = TransformerShape(16, 2, 2, 2, codes=7, classes=4, grid=(3, 4), multiple_of=16)
    network = Transformer(shape)
    network.initialise(make_generator(weights, 0))
    cache = fewlines.cache("streaming", tokens=few, sinks=1) if few else fewlines.cache("full")
    memories = [network.limit(cache)]
    return ModelObjective(settings, network, LABELS, codes, seed=3, memories=memories)


def tokenizer_task() -> TokenizerObjective:
    settings = TokenizerSettings(widths=(4, 8), codes=16, steps=45, batch=8)
    return TokenizerObjective(settings, IMAGES, seed=3)


def two_level_task() -> TokenizerObjective:
    settings = TokenizerSettings(widths=(4, 8), codes=16, steps=45, batch=8, two_levels=True)
    return TokenizerObjective(settings, IMAGES, seed=3)


def classifier_task() -> ClassifierObjective:
    settings = ClassifierSettings(widths=(4, 8), features=8, steps=12, batch=8)
    return ClassifierObjective(settings, IMAGES, LABELS, seed=3)


TASKS = [transformer_task, tokenizer_task, two_level_task, classifier_task]


@pytest.mark.parametrize("make", TASKS)
def test_a_resumed_training_ends_with_the_same_weights(make, tmp_path, monkeypatch):
    whole = make()
    train(whole, "whole", tmp_path / "whole", checkpoint_seconds=60)

    broken = make()
    loss, stop = broken.compute_loss, broken.steps // 2

    def interrupted(step, share):
        if step == stop:
            raise KeyboardInterrupt
        return loss(step, share)

    monkeypatch.setattr(broken, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(broken, "broken", tmp_path / "broken", checkpoint_seconds=1e-9)
    resumed = make()
    seen = []
    loss_again = resumed.compute_loss
    monkeypatch.setattr(
        resumed, "compute_loss", lambda step, _: seen.append(step) or loss_again(step)
    )
    train(resumed, "resumed", tmp_path / "broken", checkpoint_seconds=60)
    assert seen[0] == stop
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


@pytest.mark.parametrize(
    "changed",
    [{"steps": 6}, {"codes": CODES.roll(1, 1)}, {"weights": 4}, {"few": 4}, {"few": 5}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_checkpoint_of_another_run_is_not_continued(tmp_path, changed):
    """Of other settings, data, first weights, or another cache in the loop: even a finished one."""
    train(transformer_task(few=6), "first", tmp_path, checkpoint_seconds=60)
    other, fresh = (transformer_task(**{"few": 6, **changed}) for _ in range(2))
    train(other, "other", tmp_path, checkpoint_seconds=60)
    train(fresh, "fresh", tmp_path / "elsewhere", checkpoint_seconds=60)
    assert torch.equal(other.network.output.weight, fresh.network.output.weight)


def test_images_that_changed_are_learned_anew(tmp_path):
    train(tokenizer_task(), "first", tmp_path, checkpoint_seconds=60)
    settings = TokenizerSettings(widths=(4, 8), codes=16, steps=45, batch=8)
    other = TokenizerObjective(settings, IMAGES.flip(0), seed=3)
    assert train(other, "other", tmp_path, checkpoint_seconds=60) > 0
    took = train(tokenizer_task(), "again", tmp_path, checkpoint_seconds=60)
    assert took > 0
    # Nothing is left to do: how long a step took is what it took then.
    assert train(tokenizer_task(), "done", tmp_path, checkpoint_seconds=60) == took


def test_a_loss_that_diverges_is_reported(tmp_path, monkeypatch):
    task = transformer_task()
    loss = task.compute_loss
    monkeypatch.setattr(task, "compute_loss", lambda step, _: loss(step) * torch.nan)
    with pytest.raises(
        FewlinesError, match="the loss is nan at step 0; lower its rates and run again"
    ):
        train(task, "model", tmp_path, checkpoint_seconds=60)


def test_the_transformer_learns_a_sequence_that_is_always_the_same(tmp_path):
    task = transformer_task(steps=120)
    before = task.compute_loss(0).item()
    train(task, "model", tmp_path, checkpoint_seconds=60)
    assert before > 1.9  # log 7: an output of zeros knows nothing
    assert task.compute_loss(0).item() < 0.1


def test_the_tokenizer_learns_and_revives_codes(tmp_path):
    task = tokenizer_task()
    before = evaluate_tokenizer(task.network, IMAGES)
    train(task, "tokenizer", tmp_path, checkpoint_seconds=60)
    after = evaluate_tokenizer(task.network, IMAGES)
    assert after["mse"] < before["mse"]
    dead = torch.zeros(16, dtype=torch.bool)
    dead[3] = True
    task._revive(dead, torch.eye(8), step=0)
    assert task.network.quantizer.embedding.weight[3].sum() == 1


def test_accuracy_counts_right_answers():
    network = classifier_task().network
    guesses = network(IMAGES)[1].argmax(-1)
    assert measure_accuracy(network, IMAGES, guesses, 10) == 1
    assert measure_accuracy(network, IMAGES, (guesses + 1) % 4, 10) == 0


def test_every_epoch_shows_every_image_once():
    steps = [draw_rows(10, 4, step, seed=0) for step in range(5)]
    assert sorted(torch.cat(steps)[:10].tolist()) == list(range(10))
    assert sorted(torch.cat(steps)[10:].tolist()) == list(range(10))
    assert not torch.equal(torch.cat(steps)[:10], torch.cat(steps)[10:])


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [scale_rate(step, 100, 9) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.91)
    assert rates[99] == pytest.approx(0.01)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_orthogonalises(shape, precision):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalise(matrix, precision)
    assert made.dtype == torch.float32
    singular = torch.linalg.svdvals(made)
    assert singular.min() > 0.3
    assert singular.max() < 1.3


def test_muon_treats_a_fused_matrix_as_its_parts():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 4, generator=generator) * scale for scale in (1, 100, 10)]
    fused = torch.nn.Parameter(torch.zeros(12, 4))
    fused.grad = torch.cat(gradients)
    apart = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in gradients]
    for parameter, gradient in zip(apart, gradients, strict=True):
        parameter.grad = gradient
    Muon([{"params": [fused], "split": [4, 4, 4]}]).step()
    Muon([{"params": apart}]).step()
    torch.testing.assert_close(fused, torch.cat(apart))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_muon_takes_steps_of_the_size_that_it_says(shape):
    """Keller Jordan: an orthogonal update, times √max(1, rows/columns), times the rate."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(start.clone())
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    Muon([{"params": [weight]}], lr=0.1).step()
    step = (start - weight.detach()) / (0.1 * max(1.0, shape[0] / shape[1]) ** 0.5)
    singular = torch.linalg.svdvals(step)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    assert torch.sum(step * (u @ v)) / min(shape) > 0.8  # the polar factor of the gradient
