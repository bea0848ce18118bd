"""The schedule's calibration: a minute, once per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewlines import machine
from fewlines.attention.teacher_forced import limit_head
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policies.scheduled import Scheduled
from fewlines.cache.schedule import Schedule, sample_weights
from fewlines.calibration.capture import capture_by_layer, capture_expected
from fewlines.calibration.data import Calibration, LossCurves
from fewlines.calibration.losses import BANDS, list_capacities, measure_losses
from fewlines.config import BASE, Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_csv
from fewlines.metrics.likelihood import measure_likelihood, name_interval
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens

COUNTS = (1, 4, 16, 64)  # images of the curve, before all of them


def calibrate(
    config: Experiment,
    model: Path,
    tokens: Path,
    output: Path,
    calibration: Path | None = None,
) -> None:
    """Measure where each head looks, on the first training images, and what each head loses when
    it is limited, on those that follow. With a calibration, add what each head loses with several
    merge slots: for caches with `allocation: bands`.

    Args:
        config: the experiment.
        model: weights.
        tokens: that `tokenize` wrote.
        output: calibration to write.
        calibration: to which bands are added.
    """
    network = load_network(model, AttentionModel).to(machine.device())
    tensors, _ = read_tokens(tokens, network.spec)
    geometry = network.geometry
    if calibration is None:
        count = config.calibration.images
        labels, codes = tensors["train_labels"][:count], tensors["train_codes"][:count]
        bar = progress("calibrate", len(labels) * geometry.layers, "layers of images")
        found = capture_expected(network, labels, codes, config.calibration.batch, bar.update)
        bar.close()
        loss = _measure_losses(config, network, tensors, found, 1)
        curves = LossCurves(np.array(list_capacities(geometry)), loss)
    else:
        found = Calibration.load(calibration)
        found.check(geometry)
        of_bands = {
            count: _measure_losses(config, network, tensors, found, count) for count in BANDS
        }
        curves = replace(found.require_curves(), of_bands=of_bands)
    replace(found, curves=curves).save(output)


def _measure_losses(
    config: Experiment,
    network: AttentionModel,
    tensors: dict[str, Tensor],
    found: Calibration,
    merge_slots: int,
) -> Any:
    """What each head loses on the training images after those of calibration, its victims merged
    into so many slots."""
    geometry, first = network.geometry, config.calibration.images
    after = slice(first, first + config.calibration.curve_images)
    labels, codes = tensors["train_labels"][after], tensors["train_codes"][after]
    capacities = list_capacities(geometry)
    limit = limit_by_schedule(network, found, capacities, merge_slots)
    total = (len(capacities) - 1) * geometry.layers * geometry.heads
    bar = progress(f"what each head loses, {merge_slots} merge slots", total, "capacities")
    loss = measure_losses(network, labels, codes, limit, len(capacities), bar.update)
    bar.close()
    return loss


def limit_by_schedule(
    network: AttentionModel, found: Calibration, capacities: list[int], merge_slots: int
) -> Callable[[int, int, int], Any]:
    """Make the limits of single heads under the schedule, victims merged.

    Args:
        network: whose heads they are.
        found: its calibration.
        capacities: of a head; the last, a whole image, needs no limit.
        merge_slots: of a head.

    Returns:
        Layer, head and index of a capacity → the attention in which this head alone is limited.
    """
    geometry = network.geometry
    alike = np.full((geometry.layers, geometry.heads), 1)
    plans = []
    for capacity in capacities[:-1]:
        victims = Scheduled().choose_victims(geometry, alike * capacity, found)
        plans.append(EvictionPlan(geometry, alike * capacity, alike * merge_slots, victims))
    return lambda layer, head, index: limit_head(plans[index], layer, head, network.device)


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
    unknown = torch.full_like(test[0], base.null_class)
    plan = [(BASE, base, test[0], schedules | every_own)]
    plan += [("base, without class", base, unknown, usual | blind)]
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
