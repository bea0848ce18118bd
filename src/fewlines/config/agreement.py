"""What the sections of an experiment ask of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fewlines.config.settings import BASE

if TYPE_CHECKING:
    from fewlines.config.experiment import Experiment


def find_disagreements(experiment: Experiment) -> Iterator[str]:
    """Find settings that do not go together, a sentence for each."""
    yield from _check_tasks(experiment)
    yield from _check_training(experiment)
    yield from _check_null_class(experiment)
    yield from _check_samples(experiment)


def _check_tasks(experiment: Experiment) -> Iterator[str]:
    family, models = experiment.family, experiment.adaptation.models
    for name, task in experiment.tasks.items():
        sampling = experiment.get_sampling(f"{task.model}:{name}")
        if not task.labelled and sampling.guidance != 1:
            yield f"tasks.{name}: guidance needs a class; write labelled: true"
        if task.prompt_lines and not family.raster:
            yield (
                f"tasks.{name}.prompt_lines: {family.name} does not draw line by line, so it "
                "completes no image; leave the task out"
            )
        if task.model not in (BASE, *models):
            yield (
                f"tasks.{name}.model: {task.model} is not {BASE} or one of adaptation.models: "
                f"{', '.join(models) or 'none'}"
            )
        if f"{task.model}:{name}" in models:
            yield f"tasks.{name}: {task.model}:{name} is the name of a model too"
    for name, model in models.items():
        if model.trained not in family.parts:
            yield (
                f"adaptation.models.{name}.trained: '{model.trained}' is not one of "
                f"{', '.join(family.parts)}"
            )


def _check_training(experiment: Experiment) -> Iterator[str]:
    """That processes can divide batches, and what they can divide."""
    training = experiment.training
    parts = training.gpus * training.accumulate
    for name in ("tokenizer", "model", "adaptation"):
        batch = getattr(experiment, name).batch
        if batch % parts:
            yield (
                f"{name}.batch: {batch} images have no {parts} equal parts, as training.gpus and "
                f"accumulate ask for; write {-(-batch // parts) * parts}"
            )
    if training.shard and training.gpus == 1:
        yield (
            "training.shard: there is one process to divide over; write training.gpus, or leave "
            "out shard"
        )
    ranks = [name for name, model in experiment.adaptation.models.items() if model.rank]
    if training.shard and ranks:
        yield (
            f"training.shard: the update of low rank of {ranks[0]} cannot be divided; leave out "
            "shard, or adaptation.models' rank"
        )


def _check_null_class(experiment: Experiment) -> Iterator[str]:
    """That a model which is to draw without a class learns it."""
    model = experiment.model
    if model.class_dropout or model.checkpoint or model.start:
        return
    asked = {"sampling": experiment.sampling.guidance != 1}
    for name, task in experiment.tasks.items():
        asked[f"tasks.{name}"] = not task.labelled or task.guidance not in (None, 1)
    for name in (name for name, null in asked.items() if null):
        yield (
            f"{name}: guidance, and images of no class, need a model that learned to draw without "
            "one; write model.class_dropout, such as 0.1"
        )


def _check_samples(experiment: Experiment) -> Iterator[str]:
    sampling = experiment.sampling
    if experiment.quality.kid_subset_size > sampling.samples:
        yield "quality.kid_subset_size: must not exceed sampling.samples"
    if len(set(sampling.seeds)) < len(sampling.seeds):
        yield "sampling.seeds: one is listed more than once"
    if sampling.shards > sampling.samples:
        yield "sampling.shards: must not exceed sampling.samples"
    for number, run in enumerate(experiment.efficiency.runs, start=1):
        if not (run.batches or run.caps):
            yield f"efficiency.runs: run {number} has neither batches nor caps; it measures nothing"
