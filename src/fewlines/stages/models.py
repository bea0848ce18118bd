"""The autoregressive model: trained, adapted to its cache, or made elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fewlines import machine
from fewlines.attention.teacher_forced import leave_uncompiled
from fewlines.config import Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_json, write_tensors
from fewlines.models.base import Model, ModelSettings, TokenSpec, find_published, get_family
from fewlines.models.checkpoint import load_network, save_network
from fewlines.report.provenance import write_measured
from fewlines.stages.tokens import read_codes, read_tokens
from fewlines.training.loop import checkpoints_of, make_generator, train
from fewlines.training.low_rank import add_low_rank, merge_low_rank
from fewlines.training.model import ModelObjective, build_model
from fewlines.training.parallel import count_processes, is_first, join, read_weights, spread

SIDE = "tokens of a side of its images; what the file or its published shape says if not given"
HEADS = "query heads of a layer, where the file is of no published shape"
CROP = "of every image, from 0; all of them in turn, image by image, if not given"
CONTINUED = 2  # added to the seed: training that goes on sees images in another order


@join()
def train_model(config: Experiment, tokens: Path, output: Path, metrics: Path) -> None:
    """Train the autoregressive model.

    Args:
        config: the experiment.
        tokens: that `tokenize` wrote.
        output: weights to write.
        metrics: JSON to write, how fast it went.
    """
    _train_new(config.model, "model", config, tokens, output, metrics)


@join()
def train_architecture(
    config: Experiment, name: str, tokens: Path, output: Path, metrics: Path
) -> None:
    """Train a model of another family on the same tokens.

    Args:
        config: the experiment.
        name: of the model in the experiment.
        tokens: that `tokenize` wrote.
        output: weights to write.
        metrics: JSON to write, how fast it went.
    """
    _train_new(config.get_architecture(name), name, config, tokens, output, metrics)


def _train_new(
    settings: ModelSettings,
    name: str,
    config: Experiment,
    tokens: Path,
    output: Path,
    metrics: Path,
) -> None:
    tensors, header = read_tokens(tokens)
    family = get_family(settings.family)
    spec = TokenSpec(tuple(header["grid"]), header["codes"], header["classes"])
    shape = settings.make_shape(spec)
    network = (
        _continue(settings.start, family, shape)
        if settings.start
        else build_model(family, shape, config.seed)
    )
    network = _spread(network.to(machine.device()), config)
    dtype = machine.resolve_precision(config.precision)
    objective = ModelObjective(
        settings, network, tensors["train_labels"], tensors["train_codes"], config.seed, dtype
    )
    _train(objective, name, config, output, metrics)


def _continue(start: Path, family: type[Model], shape: Any) -> Model:
    """Continue from weights that may be of another grid, where no parameter is of a place."""
    trained = load_network(start, family)
    ours, theirs = asdict(shape), asdict(trained.shape)
    other = [name for name in ours if name != "grid" and ours[name] != theirs[name]]
    if other:
        raise FewlinesError(
            f"model.start: {start} has {', '.join(f'{name} {theirs[name]}' for name in other)}, "
            f"this experiment {', '.join(f'{name} {ours[name]}' for name in other)}; only the grid "
            "may differ"
        )
    if not (family.any_grid or shape.grid == trained.shape.grid):
        raise FewlinesError(
            f"model.start: {start} is of {trained.shape.grid} tokens, this experiment of "
            f"{shape.grid}; the family '{family.name}' learns each place of a grid, so leave out "
            "start"
        )
    network = family(shape)
    network.load_state_dict(trained.state_dict())
    return network


@join()
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
    one of its shape so.

    Args:
        config: the experiment.
        model: weights of the base model.
        tokens: that `tokenize` wrote.
        name: of the adapted model in the experiment.
        output: weights to write.
        metrics: JSON to write, how fast it went.
        calibration: of the base model, for caches that go by one.
    """
    adapted = config.get_adapted(name)
    network: Any = load_network(model, config.family)
    seed = config.seed + CONTINUED
    if adapted.start == "scratch":
        network, seed = build_model(config.family, network.shape, config.seed), config.seed
    if adapted.registers:
        network = network.with_registers(adapted.registers, make_generator(seed, 0))
    network.to(machine.device())
    part = network.parts[adapted.trained]
    if adapted.rank:
        add_low_rank(network, part, adapted.rank, make_generator(seed, 1))
    else:
        for parameter_name, parameter in network.named_parameters():
            parameter.requires_grad_(part in parameter_name)
    network = _spread(network, config)
    tensors, _ = read_tokens(tokens, network.spec)
    objective = ModelObjective(
        config.get_training(adapted),
        network,
        tensors["train_labels"],
        tensors["train_codes"],
        seed,
        machine.resolve_precision(config.precision),
        [network.limit(config.get_cache(slug).calibrated(calibration)) for slug in adapted.caches],
        load_network(model, Model).to(machine.device()) if adapted.distil else None,
        adapted.distil,
    )
    _train(objective, name, config, output, metrics)


def _spread(network: Model, config: Experiment) -> Model:
    how = config.training
    if how.compile:
        leave_uncompiled()
    return spread(
        network,
        "teacher_forced",
        divided=how.shard,
        recompute=how.recompute,
        compiled=how.compile,
    )


def _train(
    objective: ModelObjective, name: str, config: Experiment, output: Path, metrics: Path
) -> None:
    """The remaining steps; the weights go to `output`, how fast it went to `metrics`."""
    gemm_rate = machine.measure_gemm_rate(objective.dtype) * count_processes()
    every, accumulate = config.checkpoint_seconds, config.training.accumulate
    seconds = train(objective, name, checkpoints_of(output), every, accumulate)
    network = objective.network
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    weights = read_weights(network)
    if not is_first():
        return
    flops, images = network.count_training_flops(), objective.settings.batch
    rate = images * flops / seconds if seconds and flops else None
    if config.training.shard:
        network = type(network)(network.shape)
        network.load_state_dict(weights)
    else:
        merge_low_rank(network)
    summary = {
        "parameters": sum(each.numel() for each in network.parameters()),
        "trained": trained,
        "steps": objective.steps,
        "precision": machine.dtype_name(objective.dtype),
        "seconds_per_step": seconds,
        "training_flops_per_second": rate,
        "gemm_flops_per_second": gemm_rate,
        "gemm_share": rate / gemm_rate if rate else None,
    }
    write_measured(metrics, summary)
    save_network(output, network)


def import_model(
    checkpoint: Path,
    output: Path,
    metrics: Path,
    family: str = "llamagen",
    shape: str | None = None,
    side: Annotated[int | None, typer.Option(min=1, help=SIDE)] = None,
    heads: Annotated[int | None, typer.Option(min=1, help=HEADS)] = None,
    part: str | None = None,
) -> None:
    """Bring published weights into a file that every stage reads.

    Args:
        checkpoint: the published file.
        output: weights to write.
        metrics: JSON to write.
        family: of the model.
        shape: published shape that it must have, such as llamagen-b; found where not given.
        side: tokens of a side of its images.
        heads: query heads of a layer.
        part: model or ema, where the file holds both.
    """
    how = {"shape": shape, "side": side, "heads": heads, "part": part}
    network = get_family(family).read_checkpoint(checkpoint, **how)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    write_json(metrics, {"parameters": parameters, "trained": 0, "steps": 0, "gemm_share": None})
    save_network(output, network)


def import_tokens(
    shape: str,
    grid: Annotated[int, typer.Option(min=1, help="tokens of a side of the images")],
    train_codes: Path,
    train_labels: Path,
    test_codes: Path,
    test_labels: Path,
    output: Path,
    crop: Annotated[int | None, typer.Option(min=0, help=CROP)] = None,
) -> None:
    """Bring codes and classes in .npy files, or in folders of one for each image as LlamaGen's
    scripts extract them, into the file of tokens that every stage reads.

    Args:
        shape: published shape of the model, such as llamagen-b.
        grid: tokens of a side.
        train_codes: codes of the training images.
        train_labels: their classes.
        test_codes: codes of the test images.
        test_labels: their classes.
        output: safetensors file to write.
        crop: of every image.
    """
    wanted = find_published(shape)[1].on((grid, grid))
    spec = TokenSpec(wanted.grid, wanted.codes, wanted.classes)
    tensors = {}
    for name, files in (
        ("train", (train_codes, train_labels)),
        ("test", (test_codes, test_labels)),
    ):
        tensors[f"{name}_codes"], tensors[f"{name}_labels"] = read_codes(*files, spec, crop)
    write_tensors(output, tensors, asdict(spec))
