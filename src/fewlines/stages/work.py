"""What is known of an experiment's data and models before it runs, for planning it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewlines.bench.jobs import Work
from fewlines.bench.passes import make_network, place_nowhere
from fewlines.config import Experiment
from fewlines.config.checks import DataFacts
from fewlines.data import SIZES, Size, folder
from fewlines.devices import Device
from fewlines.errors import FewlinesError
from fewlines.files import read_shapes
from fewlines.models.base import Model, TokenSpec
from fewlines.models.checkpoint import load_shape
from fewlines.models.llamagen.tokenizer import SHAPES, LlamaGenTokenizer
from fewlines.models.tokenizer import Tokenizer
from fewlines.stages.tokens import read_spec


def find_work(
    experiment: Experiment, device: Device, precision: torch.dtype, cores: int = 8
) -> Work:
    """Find what has to be known of an experiment's data and models, from the files that are there
    and, where none is yet, from what is known of its source and of published shapes.

    Args:
        experiment: that is planned.
        device: that each job has to itself.
        precision: of its products.
        cores: of the processor beside a device, or of the processor.

    Raises:
        FewlinesError: it cannot be known; with what to write or run first.
    """
    data = experiment.data
    if data.tokens:
        shapes, header = read_shapes(data.tokens)
        spec = read_spec(data.tokens, header)
        counts = (shapes["train_codes"][0], shapes["test_codes"][0])
        network = _find_network(experiment, spec)
        facts = DataFacts(*counts, None, spec.grid)
        return Work(experiment, facts, 0, spec.classes, network, None, device, precision, cores)
    images = _find_images(experiment)
    height, width = images.side
    tokenizer = _find_tokenizer(experiment, images)
    stride = tokenizer.shape.stride
    grid = (height // stride, width // stride)
    network = _find_network(experiment, TokenSpec(grid, tokenizer.shape.codes, images.classes))
    facts = DataFacts(images.train, images.test, images.side, grid)
    return Work(
        *(experiment, facts, images.channels, images.classes, network, tokenizer),
        *(device, precision, cores),
    )


def _find_images(experiment: Experiment) -> Size:
    """Find their size: of the fetched file, of the folder, or of what is known of the source."""
    data = experiment.data
    made = Path("results/data") / f"{data.slug}.safetensors"
    if made.exists():
        shapes, header = read_shapes(made)
        train, channels, height, width = shapes["train_images"]
        test, classes = shapes["test_images"][0], len(header["classes"])
        return Size(train, test, channels, (height, width), classes)
    if data.source in SIZES:
        return SIZES[data.source]
    side = data.side or folder.SIDE
    count, classes = data.images, 0
    if data.source == "folder" and data.path and data.path.is_dir():
        count = len(folder.image_files(data.path))
        classes = sum(1 for each in data.path.iterdir() if each.is_dir())
    if experiment.model.checkpoint and not classes:
        classes = _find_published(experiment, (1, 1)).classes
    if not count:
        raise FewlinesError(
            f"data: how many images '{data.source}' has is not known yet; run 'snakemake {made}' "
            "first, or write data.images"
        )
    test = count // folder.TEST_SHARE
    return Size(count - test, test, 3, (side, side), classes or 1)


def _find_tokenizer(experiment: Experiment, images: Size) -> Tokenizer:
    given = experiment.tokenizer
    if given.weights is None:
        return place_nowhere(given.make, images.channels)
    if given.weights.exists():
        kind, shape = load_shape(given.weights)
        tokenizer: Tokenizer = place_nowhere(kind, shape)
        return tokenizer
    height, _ = images.side
    stride = height // (getattr(experiment.model, "side", None) or height)
    if stride not in SHAPES:
        raise FewlinesError(f"tokenizer.weights: {given.weights} is not there to be planned with")
    return place_nowhere(LlamaGenTokenizer, SHAPES[stride])


def _find_network(experiment: Experiment, spec: TokenSpec) -> Model:
    settings = experiment.model
    if settings.checkpoint is None:
        return make_network(settings, spec)
    if settings.checkpoint.exists():
        options = settings.checkpoint_options
        return experiment.family.read_checkpoint(settings.checkpoint, **options).to("meta")
    return place_nowhere(experiment.family, _find_published(experiment, spec.grid))


def _find_published(experiment: Experiment, grid: tuple[int, int]) -> Any:
    """The shape that the experiment says of a checkpoint that is not there yet."""
    name = experiment.model.checkpoint_options.get("shape")
    if name is None:
        raise FewlinesError(
            f"model.checkpoint: {experiment.model.checkpoint} is not there yet; write model.shape "
            "to plan without it"
        )
    return experiment.family.published[name].on(grid)
