"""Images, and the tokenizer and classifier that are trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fewlines import machine
from fewlines.config import Experiment
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError, look_up
from fewlines.files import write_tensors
from fewlines.models.checkpoint import load_network, load_tokenizer, save_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.progress import progress
from fewlines.report.provenance import write_measured
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
    look_up(source, SOURCES, "data source")(path, side).save(output)


@join()
def train_tokenizer(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the VQ tokenizer, or take one that is trained, or pixels as they are.

    Args:
        config: the experiment.
        images: that `fetch-data` wrote.
        output: weights to write.
        metrics: JSON to write, its error on test images.
    """
    data = ImageData.load(images)
    seconds, given, channels = 0.0, config.tokenizer.weights, data.train.images.shape[1]
    network: Tokenizer
    if not config.tokenizer.trained:
        made = load_tokenizer(given) if given else config.tokenizer.make(channels)
        network = made.to(machine.device())
    else:
        objective = TokenizerObjective(config.tokenizer, data.train.images, config.seed)
        every, accumulate = config.checkpoint_seconds, config.training.accumulate
        seconds = train(objective, "tokenizer", checkpoints_of(output), every, accumulate)
        network = objective.network
    if not is_first():
        return
    found = evaluate_tokenizer(network, data.test.images)
    write_measured(metrics, {**found, "seconds_per_step": seconds})
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
    write_measured(metrics, {"accuracy": found, "seconds_per_step": seconds})
    save_network(output, objective.network)


def tokenize(
    images: Path,
    tokenizer: Path,
    output: Path,
    shard: Annotated[int, typer.Option(min=0, help="which part of the images, from 0")] = 0,
    shards: Annotated[int, typer.Option(min=1, help="how many parts there are")] = 1,
) -> None:
    """Encode all images, training and test, or one part of them, which `gather` puts together.

    Args:
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        output: safetensors file to write.
        shard: which part of the images.
        shards: how many parts there are.
    """
    if shard >= shards:
        raise FewlinesError(f"--shard {shard}: there are {shards}, from 0")
    data = ImageData.load(images)
    network = load_network(tokenizer, Tokenizer).to(machine.device())
    tensors, grid = {}, (0, 0)
    for name, split in (("train", data.train), ("test", data.test)):
        # In whole batches: a part's codes are those of all at once.
        batches = -(-len(split) // EVALUATION_BATCH)
        first, last = (batches * edge // shards * EVALUATION_BATCH for edge in (shard, shard + 1))
        rows = range(len(split))[first:last]
        bar = progress(f"tokenize {name}", len(rows), "images")
        height, width = (side // network.shape.stride for side in split.images.shape[-2:])
        codes = torch.empty(len(rows), height * width, dtype=torch.int32)
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = split.images[first + start : min(first + start + EVALUATION_BATCH, last)]
            codes[start : start + len(part)] = network.encode(part).flatten(1)
            bar.update(len(part))
        bar.close()
        grid = (height, width)
        tensors[f"{name}_codes"], tensors[f"{name}_labels"] = codes, split.labels[first:last]
    spec = {"grid": grid, "codes": network.shape.codes, "classes": len(data.classes)}
    write_tensors(output, tensors, {**spec, "origins": list(data.origins)})
