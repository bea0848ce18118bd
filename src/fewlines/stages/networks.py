"""Images, and the three networks that are trained on them."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines import machine
from fewlines.config import Experiment
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError
from fewlines.files import write_json, write_tensors
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.models.transformer import TransformerShape
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens
from fewlines.training.classifier import ClassifierTask, accuracy
from fewlines.training.loop import train
from fewlines.training.tokenizer import TokenizerTask, evaluate_tokenizer
from fewlines.training.transformer import TransformerTask, flops_per_image

EVALUATION_BATCH = 250


def fetch_data(source: str, output: Path, path: Path | None = None) -> None:
    """Find or fetch the images of a source; `path` is a folder with its files."""
    if source not in SOURCES:
        raise FewlinesError(f"unknown data source '{source}'; there are {', '.join(SOURCES)}")
    SOURCES[source](path).save(output)


def train_tokenizer(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the VQ tokenizer; its test error goes to `metrics`."""
    data = ImageData.load(images)
    task = TokenizerTask(config.tokenizer, data.train.images, config.seed)
    seconds = train(task, "tokenizer", _checkpoints(output), config.checkpoint_seconds)
    found = evaluate_tokenizer(task.network, data.test.images, EVALUATION_BATCH)
    write_json(metrics, {**found, "seconds_per_step": seconds})
    save_network(output, task.network)


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
    shape = TransformerShape(
        dim=settings.dim,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads or settings.heads,
        codes=header["codes"],
        classes=header["classes"],
        grid=tuple(header["grid"]),
    )
    dtype = machine.resolve_precision(config.precision)
    gemm_rate = machine.gemm_rate(dtype)
    task = TransformerTask(
        settings, shape, tensors["train_labels"], tensors["train_codes"], config.seed, dtype
    )
    seconds = train(task, "model", _checkpoints(output), config.checkpoint_seconds)
    rate = settings.batch * flops_per_image(shape) / seconds if seconds else None
    summary = {
        "parameters": sum(parameter.numel() for parameter in task.network.parameters()),
        "precision": str(dtype).removeprefix("torch."),
        "seconds_per_step": seconds,
        "training_flops_per_second": rate,
        "gemm_flops_per_second": gemm_rate,
        "gemm_share": rate / gemm_rate if rate else None,
    }
    write_json(metrics, summary)
    save_network(output, task.network)


def _checkpoints(output: Path) -> Path:
    return output.with_suffix(".checkpoints")
