"""Images, the three networks that are trained on them, and models adapted to their cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from fewlines import machine
from fewlines.config import Experiment
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError
from fewlines.files import write_json, write_tensors
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.models.transformer import Transformer, TransformerShape
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens
from fewlines.training.classifier import ClassifierTask, accuracy
from fewlines.training.loop import step_generator, train
from fewlines.training.low_rank import add_low_rank, merge_low_rank
from fewlines.training.tokenizer import TokenizerTask, evaluate_tokenizer
from fewlines.training.transformer import (
    TransformerTask,
    attend_in_training,
    flops_per_image,
    new_transformer,
)

EVALUATION_BATCH = 250
CONTINUED = 2  # added to the seed: training that goes on sees images in another order
TRAINED = {"all": "", "attention": ".attention.", "norms": "norm"}  # parts of their names


def fetch_data(
    source: str, output: Path, path: Path | None = None, side: int | None = None
) -> None:
    """Find or fetch the images of a source; `path` is a folder with its files,
    `side` the pixels that images of a folder are brought to."""
    if source not in SOURCES:
        raise FewlinesError(f"unknown data source '{source}'; there are {', '.join(SOURCES)}")
    SOURCES[source](path, side).save(output)


def train_tokenizer(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the VQ tokenizer, or take one that is trained; its test error goes to `metrics`."""
    data = ImageData.load(images)
    if config.tokenizer.weights:
        network, seconds = load_network(config.tokenizer.weights, Tokenizer), 0.0
    else:
        task = TokenizerTask(config.tokenizer, data.train.images, config.seed)
        seconds = train(task, "tokenizer", _checkpoints(output), config.checkpoint_seconds)
        network = task.network
    found = evaluate_tokenizer(network, data.test.images, EVALUATION_BATCH)
    write_json(metrics, {**found, "seconds_per_step": seconds})
    save_network(output, network)


def train_classifier(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the classifier whose features quality is measured in."""
    data = ImageData.load(images)
    train_set, test = data.train, data.test
    task = ClassifierTask(config.classifier, train_set.images, train_set.labels, config.seed)
    seconds = train(task, "classifier", _checkpoints(output), config.checkpoint_seconds)
    found = accuracy(task.network, test.images, test.labels, EVALUATION_BATCH)
    write_json(metrics, {"accuracy": found, "seconds_per_step": seconds})
    save_network(output, task.network)


def tokenize(images: Path, tokenizer: Path, output: Path) -> None:
    """Encode all images, training and test."""
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


def train_model(config: Experiment, tokens: Path, output: Path, metrics: Path) -> None:
    """Train the autoregressive transformer; how fast it went goes to `metrics`."""
    tensors, header = read_tokens(tokens)
    settings = config.model
    shape = settings.on(tuple(header["grid"]), header["codes"], header["classes"])
    network = (
        _begun(settings.start, shape) if settings.start else new_transformer(shape, config.seed)
    )
    network.to(machine.device())
    dtype = machine.resolve_precision(config.precision)
    task = TransformerTask(
        settings, network, tensors["train_labels"], tensors["train_codes"], config.seed, dtype
    )
    _train_transformer(task, "model", config, output, metrics)


def _begun(start: Path, shape: TransformerShape) -> Transformer:
    """Weights of another grid on this one: positions are rotations, so all of them serve."""
    trained = load_network(start, Transformer)
    ours, theirs = asdict(shape), asdict(trained.shape)
    other = [name for name in ours if name != "grid" and ours[name] != theirs[name]]
    if other:
        raise FewlinesError(
            f"model.start: {start} has {', '.join(f'{name} {theirs[name]}' for name in other)}, "
            f"this experiment {', '.join(f'{name} {ours[name]}' for name in other)}; only the grid "
            "may differ"
        )
    network = Transformer(shape)
    network.load_state_dict(trained.state_dict())
    return network


def adapt(
    config: Experiment,
    model: Path,
    tokens: Path,
    name: str,
    output: Path,
    metrics: Path,
    calibration: Path | None = None,
) -> None:
    """Go on training a model with its attention limited as caches will limit it; or train a new
    one of its shape so."""
    adapted = config.adapted(name)
    network, seed = load_network(model, Transformer), config.seed + CONTINUED
    if adapted.start == "scratch":
        network, seed = new_transformer(network.shape, config.seed), config.seed
    network = network.with_registers(adapted.registers, step_generator(seed, 0))
    network.to(machine.device())
    part = TRAINED[adapted.trained]
    if adapted.rank:
        add_low_rank(network, part, adapted.rank, step_generator(seed, 1))
    else:
        for parameter_name, parameter in network.named_parameters():
            parameter.requires_grad_(part in parameter_name)
    tensors, _ = read_tokens(tokens, network.shape)
    placements = [
        config.cache(slug).calibrated(calibration).place(network.shape.geometry)
        for slug in adapted.caches
    ]
    task = TransformerTask(
        config.continued(adapted),
        network,
        tensors["train_labels"],
        tensors["train_codes"],
        seed,
        machine.resolve_precision(config.precision),
        [attend_in_training(placement, machine.device()) for placement in placements],
        load_network(model, Transformer).to(machine.device()) if adapted.distil else None,
        adapted.distil,
    )
    _train_transformer(task, name, config, output, metrics)


def _train_transformer(
    task: TransformerTask, name: str, config: Experiment, output: Path, metrics: Path
) -> None:
    """The remaining steps; the weights go to `output`, how fast it went to `metrics`."""
    gemm_rate = machine.gemm_rate(task.dtype)
    seconds = train(task, name, _checkpoints(output), config.checkpoint_seconds)
    images = task.settings.batch
    rate = images * flops_per_image(task.network.shape) / seconds if seconds else None
    parameters = list(task.network.parameters())
    summary = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "steps": task.steps,
        "precision": machine.dtype_name(task.dtype),
        "seconds_per_step": seconds,
        "training_flops_per_second": rate,
        "gemm_flops_per_second": gemm_rate,
        "gemm_share": rate / gemm_rate if rate else None,
    }
    write_json(metrics, summary)
    merge_low_rank(task.network)
    save_network(output, task.network)


def _checkpoints(output: Path) -> Path:
    return output.with_suffix(".checkpoints")
