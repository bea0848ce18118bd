"""The schedule's calibration: a minute, once per model."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from fewlines import machine
from fewlines.cache.schedule import Schedule, sample_weights
from fewlines.cache.spec import Cache, parse_cache
from fewlines.calibration.capture import capture_by_layer, capture_expected
from fewlines.calibration.data import Calibration, average
from fewlines.config import BASE, Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_csv
from fewlines.metrics.head_losses import add_bands, add_curves, add_losses
from fewlines.metrics.likelihood import measure_likelihood, name_interval
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens

COUNTS = (1, 4, 16, 64)  # images of the curve, before all of them


def calibrate(
    config: Experiment | None,
    output: Path,
    model: Path | None = None,
    tokens: Path | None = None,
    calibration: Path | None = None,
    transformers: Path | None = None,
    prompts: Path | None = None,
    images: Annotated[int, typer.Option(min=1, help="that a model of transformers draws")] = 16,
    cache: str = "scheduled+merge:4lines",
    grid: str | None = None,
) -> None:
    """Measure where each head looks, on the first training images, and what each head loses when
    it is limited, on those that follow. With a calibration, add what each head loses with several
    merge slots: for caches with `allocation: bands`. Of a model of transformers, measure it on
    images that it draws, and write the schedule of one cache.

    Args:
        config: the experiment.
        output: calibration to write, or schedule.
        model: weights.
        tokens: that `tokenize` wrote.
        calibration: to which bands are added.
        transformers: folder of a model, in place of an experiment, weights and tokens.
        prompts: text file, a prompt a line, that this model draws.
        images: that this model draws.
        cache: of this model.
        grid: of this model's images, such as 24x24, where its configuration does not say.
    """
    if transformers is not None:
        if model or tokens or calibration or prompts is None:
            raise FewlinesError(
                "--transformers goes with --prompts, --images, --cache and --grid alone"
            )
        made = _schedule_pretrained(transformers, prompts, images, parse_cache(cache), grid)
        made.save(output)
        return
    if config is None or model is None or tokens is None:
        raise FewlinesError("give --config, --model and --tokens, or --transformers and --prompts")
    network = load_network(model, AttentionModel).to(machine.device())
    tensors, _ = read_tokens(tokens, network.spec)
    geometry, count = network.geometry, config.calibration.images
    rest = slice(count, count + config.calibration.curve_images)
    after = tensors["train_labels"][rest], tensors["train_codes"][rest]
    if calibration is None:
        labels, codes = tensors["train_labels"][:count], tensors["train_codes"][:count]
        bar = progress("calibrate", len(labels) * geometry.layers, "layers of images")
        found = capture_expected(network, labels, codes, config.calibration.batch, bar.update)
        bar.close()
        found = add_curves(found, network, *after)
    else:
        found = Calibration.load(calibration)
        found.check(geometry)
        found = add_bands(found, network, *after)
    found.save(output)


def _schedule_pretrained(
    path: Path, prompts: Path, images: int, cache: Cache, grid: str | None
) -> Schedule:
    """The schedule of a model of transformers, calibrated on images that it draws: prompt by
    prompt, so that none is padded."""
    from fewlines.integrations import layered
    from fewlines.integrations.transformers import find_geometry

    if grid is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", grid):
        raise FewlinesError(f"--grid: {grid!r} is not lines and tokens of a line, such as 24x24")
    model = layered.load_pretrained(path).to(machine.device())
    height, width = map(int, grid.split("x")) if grid else (0, 0)
    geometry = find_geometry(model, (height, width) if grid else None)
    if not cache.requires:
        raise FewlinesError(f"{cache.slug} goes by no calibration; FewLinesCache takes it as it is")
    asked = layered.read_prompts(prompts, path, model, geometry)[:images]
    shares = [images // len(asked) + (i < images % len(asked)) for i in range(len(asked))]
    bar = progress("draw for calibration", images, "images")
    drawn = []
    for number, (prompt, count) in enumerate(zip(asked, shares, strict=True)):
        codes = layered.draw_codes(model, prompt, count, geometry, number)
        branches = layered.list_branches(model, prompt)
        labels = torch.arange(len(branches)).repeat_interleave(count)
        of = layered.LayeredDecoder(model, branches, geometry.grid)
        drawn.append((of, labels, codes.repeat(len(branches), 1)))
        bar.update(count)
    bar.close()
    bar = progress("calibrate", geometry.layers * sum(len(x[1]) for x in drawn), "layers of images")
    weights = sample_weights(model)
    if cache.allocation == "uniform":
        each = [capture_by_layer(*given, 2, bar.update) for given in drawn]
        layers = (average(parts) for parts in zip(*each, strict=True))
        schedule = Schedule.by_layer(cache, geometry, layers)
    else:
        parts = [(capture_expected(*given, 2, bar.update), given) for given in drawn]
        found = add_losses(cache.requires, parts)
        schedule = Schedule.of(replace(cache, calibration=found), geometry)
    bar.close()
    return replace(schedule, weights=weights, model=path.name)


def export_schedule(
    config: Experiment,
    model: Path,
    cache: str,
    output: Path,
    calibration: Path | None = None,
    tokens: Path | None = None,
) -> None:
    """Write what a cache decides for a model before the first token, in a few kilobytes: who serves
    the model needs no calibration beside its weights, see `fewlines.load_schedule`.

    Args:
        config: the experiment.
        model: weights.
        cache: its name in the experiment.
        output: schedule to write.
        calibration: of the model, for caches that go by one.
        tokens: in place of a calibration, which is then measured here, a layer at a time: for large
            grids, where all layers would not fit memory.
    """
    if calibration and tokens:
        raise FewlinesError(
            "--calibration is measured already, --tokens measures anew; give one of the two"
        )
    network = load_network(model, AttentionModel)
    limited, geometry = config.get_cache(cache), network.geometry
    if tokens is None or not limited.requires:
        schedule = Schedule.of(limited.calibrated(calibration), geometry)
    else:
        network.to(machine.device())
        tensors, _ = read_tokens(tokens, network.spec)
        first = slice(config.calibration.images)
        labels, codes = tensors["train_labels"][first], tensors["train_codes"][first]
        bar = progress("calibrate", len(labels) * geometry.layers, "layers of images")
        layers = capture_by_layer(network, labels, codes, config.calibration.batch, bar.update)
        schedule = Schedule.by_layer(limited, geometry, layers)
        bar.close()
    replace(schedule, weights=sample_weights(network)).save(output)


def calibration_curve(
    config: Experiment,
    model: Path,
    tokens: Path,
    output: Path,
    adapted: list[Path] | None = None,
) -> None:
    """Measure what a schedule loses that was calibrated on fewer images, on those of one class, on
    images without their class, or on another model, for every calibrated cache of the experiment.

    Args:
        config: the experiment.
        model: weights of the base model.
        tokens: that `tokenize` wrote.
        output: CSV to write.
        adapted: weights of other models; may be given again.
    """
    device = machine.device()
    base = load_network(model, AttentionModel).to(device)
    others = {
        path.parent.name: load_network(path, AttentionModel).to(device) for path in adapted or []
    }
    tensors, _ = read_tokens(tokens, base.spec)
    labels, codes = tensors["train_labels"], tensors["train_codes"]
    count = config.likelihood.images
    test = (tensors["test_labels"][:count], tensors["test_codes"][:count])
    most, batch = config.calibration.images, config.calibration.batch

    def capture(network: AttentionModel, images: Tensor, known: bool = True) -> Calibration:
        of = labels[images] if known else torch.full_like(labels[images], network.null_class)
        return capture_expected(network, of, codes[images], batch)

    everything = torch.arange(most)
    usual = {f"first {most}": capture(base, everything)}
    blind = {}
    if base.has_null_class:
        blind = {f"first {most}, without their class": capture(base, everything, known=False)}
    class_0 = torch.nonzero(labels == 0).flatten()[:most]
    schedules = {f"first {few}": capture(base, torch.arange(few)) for few in COUNTS if few < most}
    schedules |= usual | {f"{most} of class 0": capture(base, class_0)} | blind
    if config.calibration.transferred:
        small = Calibration.load(config.calibration.transferred)
        source = f"{small.grid[0]}×{small.grid[1]} tokens, transferred"
        schedules |= {
            f"{source} by tokens": small.transfer(base.spec.grid),
            f"{source} by place": small.transfer(base.spec.grid, stretched=True),
        }
    own = {name: {f"{name}'s own": capture(other, everything)} for name, other in others.items()}
    every_own = {source: found for each in own.values() for source, found in each.items()}
    # Allocations by what each head loses need more than expected attention.
    caches = [each for each in config.cache_by_slug.values() if each.requires == "attention"]
    plan = [(BASE, base, test[0], schedules | every_own)]
    if base.has_null_class:
        plan += [("base, without class", base, base.blank(test[0]), usual | blind)]
    plan += [
        (name, other, test[0], {"base's": next(iter(usual.values()))} | own[name])
        for name, other in others.items()
    ]
    bar = progress("calibration curve", len(caches) * sum(len(row[3]) for row in plan), "schedules")
    rows = []
    for name, network, of, calibrations in plan:
        for (source, found), cache in product(calibrations.items(), caches):
            limited = replace(cache, calibration=found)
            measured = measure_likelihood(network, of, test[1], limited, config.likelihood.batch)
            rows.append(
                {
                    "model": name,
                    "calibrated_on": source,
                    "policy": cache.policy_text,
                    "budget": cache.budget_text,
                    **name_interval("nll_delta", measured.nll - measured.nll_full),
                    "likelihood_images": len(measured.nll),
                }
            )
            bar.update()
    bar.close()
    write_csv(output, rows)
