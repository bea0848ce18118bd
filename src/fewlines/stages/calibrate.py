"""The schedule's calibration: a minute, once per model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fewlines import machine
from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry
from fewlines.cache.schedule import Schedule
from fewlines.config import BASE, Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_text
from fewlines.measure.attention import expected_attention, expected_by_layer
from fewlines.measure.budgets import SUMMARIES, measure_curves, measure_summaries, rooms_of
from fewlines.measure.likelihood import measure_likelihood, named_interval
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens

COUNTS = (1, 4, 16, 64)  # images of the curve, before all of them


def calibrate(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Measure where each head looks, on the first training images, and what each
    head loses when it is limited, on those that follow."""
    network = load_network(model, Transformer).to(machine.device())
    tensors, _ = read_tokens(tokens, network.shape)
    count = config.calibration.images
    labels, codes = tensors["train_labels"][:count], tensors["train_codes"][:count]
    geometry = network.shape.geometry
    bar = progress("calibrate", len(labels) * geometry.layers, "layers of images")
    found = expected_attention(network, labels, codes, config.calibration.batch, bar.update)
    bar.close()
    bar = progress("what each head loses", _limited_heads(geometry), "rooms")
    curves = measure_curves(network, *_curve_images(config, tensors), found, bar.update)
    bar.close()
    replace(found, curves=curves).save(output)


def calibrate_summaries(
    config: Experiment, model: Path, tokens: Path, calibration: Path, output: Path
) -> None:
    """A calibration, and beside it what each head loses with several summaries: for caches with
    'split: summaries'. Two minutes."""
    network = load_network(model, Transformer).to(machine.device())
    tensors, _ = read_tokens(tokens, network.shape)
    found, geometry = Calibration.load(calibration), network.shape.geometry
    found.check(geometry)
    rooms = len(SUMMARIES) * _limited_heads(geometry)
    bar = progress("what each head loses with several summaries", rooms, "rooms")
    curves = measure_summaries(network, *_curve_images(config, tensors), found, bar.update)
    bar.close()
    replace(found, curves=curves).save(output)


def _curve_images(config: Experiment, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Labels and codes of the training images after those of calibration."""
    first = config.calibration.images
    after = slice(first, first + config.calibration.curve_images)
    return tensors["train_labels"][after], tensors["train_codes"][after]


def _limited_heads(geometry: Geometry) -> int:
    """How often a curve of every head limits one; with the last room nothing is limited."""
    return (len(rooms_of(geometry)) - 1) * geometry.layers * geometry.heads


def export_schedule(
    config: Experiment,
    model: Path,
    cache: str,
    output: Path,
    calibration: Path | None = None,
    tokens: Path | None = None,
) -> None:
    """What a cache decides for this model before the first token, in a few kilobytes: who serves
    the model needs no calibration beside its weights, see `fewlines.load_schedule`. With `tokens`
    in place of a calibration it is measured here, a layer at a time: for large grids, where all
    layers would not fit memory."""
    if calibration and tokens:
        raise FewlinesError(
            "--calibration is measured already, --tokens measures anew; give one of the two"
        )
    network = load_network(model, Transformer)
    limited, geometry = config.cache(cache), network.shape.geometry
    if tokens is None or not limited.needs_calibration:
        schedule = Schedule.of(limited.calibrated(calibration), geometry)
    else:
        network.to(machine.device())
        tensors, _ = read_tokens(tokens, network.shape)
        first = slice(config.calibration.images)
        labels, codes = tensors["train_labels"][first], tensors["train_codes"][first]
        bar = progress("calibrate", len(labels) * geometry.layers, "layers of images")
        batch = config.calibration.batch
        layers = expected_by_layer(network, labels, codes, batch, bar.update)
        schedule = Schedule.by_layer(limited, geometry, layers)
        bar.close()
    schedule.save(output)


def calibration_curve(
    config: Experiment,
    model: Path,
    tokens: Path,
    output: Path,
    adapted: list[Path] | None = None,
) -> None:
    """What a schedule loses that was calibrated on fewer images, on those of one class, on images
    without their class, or on another model, for every calibrated cache of the experiment."""
    device = machine.device()
    base = load_network(model, Transformer).to(device)
    others = {
        path.parent.name: load_network(path, Transformer).to(device) for path in adapted or []
    }
    tensors, _ = read_tokens(tokens, base.shape)
    labels, codes = tensors["train_labels"], tensors["train_codes"]
    test = (tensors["test_labels"], tensors["test_codes"])
    most, batch = config.calibration.images, config.calibration.batch

    def look(network: Transformer, images: Tensor, known: bool = True) -> Calibration:
        of = labels[images] if known else torch.full_like(labels[images], network.null_class)
        return expected_attention(network, of, codes[images], batch)

    everything = torch.arange(most)
    usual, blind = look(base, everything), look(base, everything, known=False)
    class_0 = torch.nonzero(labels == 0).flatten()[:most]
    schedules = {
        f"first {count}": look(base, torch.arange(count)) for count in COUNTS if count < most
    }
    schedules |= {f"first {most}": usual, f"{most} of class 0": look(base, class_0)}
    schedules |= {f"first {most}, without their class": blind}
    if config.calibration.carried:
        small = Calibration.load(config.calibration.carried)
        grid = base.shape.grid
        source = f"{small.grid[0]}×{small.grid[1]} tokens, carried"
        schedules |= {
            f"{source} by tokens": small.carried(grid),
            f"{source} by place": small.carried(grid, stretched=True),
        }
    by_others = {f"{name}'s own": look(network, everything) for name, network in others.items()}
    bases = {"base's": usual}
    # Splits by what each head loses need more than expected attention.
    caches = [
        cache
        for cache in config.cache_by_slug.values()
        if cache.needs_calibration and cache.split == "uniform"
    ]
    plan = [(BASE, base, test[0], schedules | by_others)]
    unknown = torch.full_like(test[0], base.null_class)
    names = (f"first {most}", f"first {most}, without their class")
    plan += [("base, without class", base, unknown, {name: schedules[name] for name in names})]
    plan += [
        (name, network, test[0], bases | {f"{name}'s own": by_others[f"{name}'s own"]})
        for name, network in others.items()
    ]
    bar = progress("calibration curve", len(caches) * sum(len(row[3]) for row in plan), "schedules")
    rows = []
    count = config.likelihood.images
    for name, network, of, calibrations in plan:
        for (source, calibration), cache in product(calibrations.items(), caches):
            limited = replace(cache, calibration=calibration)
            found = measure_likelihood(
                network, of[:count], test[1][:count], limited, config.likelihood.batch
            )
            rows.append(
                {
                    "model": name,
                    "calibrated_on": source,
                    "policy": cache.policy_text,
                    "budget": cache.budget_text,
                    **named_interval("nll_delta", found.nll - found.nll_full),
                    "likelihood_images": len(found.nll),
                }
            )
            bar.update()
    bar.close()
    write_text(output, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
