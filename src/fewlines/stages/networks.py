"""Images, and the tokenizer and classifier that are trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fewlines.config import Experiment
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError
from fewlines.files import write_json, write_tensors
from fewlines.models.checkpoint import load_network, load_tokenizer, save_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.progress import progress
from fewlines.training.classifier import ClassifierObjective, measure_accuracy
from fewlines.training.loop import checkpoints_of, train
from fewlines.training.parallel import is_first, join
from fewlines.training.tokenizer import TokenizerObjective, evaluate_tokenizer

EVALUATION_BATCH = 250


def fetch_data(
    source: str,
    output: Path,
    path: Path | None = None,
    side: Annotated[int | None, typer.Option(min=1, help="pixels of a side")] = None,
) -> None:
    """Find or fetch the images of a source.

    Args:
        source: its name.
        output: safetensors file to write.
        path: a folder with its files.
        side: pixels that images of a folder are brought to.
    """
    if source not in SOURCES:
        raise FewlinesError(f"unknown data source '{source}'; there are {', '.join(SOURCES)}")
    SOURCES[source](path, side).save(output)


@join()
def train_tokenizer(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the VQ tokenizer, or take one that is trained.

    Args:
        config: the experiment.
        images: that `fetch-data` wrote.
        output: weights to write.
        metrics: JSON to write, its error on test images.
    """
    data = ImageData.load(images)
    seconds = 0.0
    if config.tokenizer.weights:
        network = load_tokenizer(config.tokenizer.weights)
    else:
        objective = TokenizerObjective(config.tokenizer, data.train.images, config.seed)
        every, accumulate = config.checkpoint_seconds, config.training.accumulate
        seconds = train(objective, "tokenizer", checkpoints_of(output), every, accumulate)
        if not is_first():
            return
        network = objective.network
    found = evaluate_tokenizer(network, data.test.images)
    write_json(metrics, {**found, "seconds_per_step": seconds})
    save_network(output, network)


def train_classifier(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the classifier whose features quality is measured in.

    Args:
        config: the experiment.
        images: that `fetch-data` wrote.
        output: weights to write.
        metrics: JSON to write, its accuracy on test images.
    """
    data = ImageData.load(images)
    settings, train_set = config.classifier, data.train
    objective = ClassifierObjective(settings, train_set.images, train_set.labels, config.seed)
    seconds = train(objective, "classifier", checkpoints_of(output), config.checkpoint_seconds)
    found = measure_accuracy(
        objective.network, data.test.images, data.test.labels, EVALUATION_BATCH
    )
    write_json(metrics, {"accuracy": found, "seconds_per_step": seconds})
    save_network(output, objective.network)


def tokenize(images: Path, tokenizer: Path, output: Path) -> None:
    """Encode all images, training and test.

    Args:
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        output: safetensors file to write.
    """
    data = ImageData.load(images)
    network = load_network(tokenizer, Tokenizer)
    tensors, grid = {}, (0, 0)
    for name, split in (("train", data.train), ("test", data.test)):
        bar = progress(f"tokenize {name}", len(split), "images")
        parts = []
        for part in split.images.split(EVALUATION_BATCH):
            parts.append(network.encode(part).to(torch.int32))
            bar.update(len(part))
        bar.close()
        codes = torch.cat(parts)
        grid = (codes.shape[1], codes.shape[2])
        tensors[f"{name}_codes"] = codes.flatten(1)
        tensors[f"{name}_labels"] = split.labels
    header = {"grid": grid, "codes": network.shape.codes, "classes": len(data.classes)}
    write_tensors(output, tensors, header)
