"""Time and memory of each cache, beside both full caches; and what a step of training costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewlines import machine
from fewlines.bench.cost import Configuration, Workload
from fewlines.bench.cost import measure_cost as measure
from fewlines.bench.memory import peak_method
from fewlines.bench.training_cost import measure_training
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.config import Experiment
from fewlines.config.settings import CostSettings, PaperSettings
from fewlines.files import write_csv
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network, load_shape
from fewlines.report.provenance import make_stamp_here, write_measured
from fewlines.stages.samples import make_sampler


def measure_cost(
    config: Experiment, model: Path, cache: str, output: Path, calibration: Path | None = None
) -> None:
    """Measure time and memory of one cache beside both full caches, interleaved in one run.

    Args:
        config: the experiment.
        model: weights of the base model.
        cache: its name in the experiment.
        output: JSON to write.
        calibration: of the model, for caches that go by one.
    """
    caches = _settle(config, model, [cache], calibration)
    _measure(config, config.cost, model, caches, output)


def measure_paper(
    config: Experiment, model: Path, output: Path, calibration: Path | None = None
) -> None:
    """Measure the caches of the paper's table at its batch, where the cache is what fills memory.

    Args:
        config: the experiment.
        model: weights of the base model.
        output: JSON to write.
        calibration: of the model, for caches that go by one.
    """
    caches = _settle(config, model, config.paper_caches, calibration)
    _measure(config, config.paper, model, caches, output)


def measure_architecture(config: Experiment, model: Path, output: Path) -> None:
    """Measure time and memory of drawing with a model of another family, in each of its ways.

    Args:
        config: the experiment.
        model: its weights.
        output: JSON to write.
    """
    _measure(config, config.cost, model, [], output)


def _settle(
    config: Experiment, model: Path, slugs: Sequence[str], calibration: Path | None
) -> list[Cache | Schedule]:
    """The limited ones of these caches, as they are served: a calibration is not their memory."""
    caches = [config.get_cache(slug) for slug in slugs if slug != "full"]
    if not caches:
        return []
    geometry = load_network(model, AttentionModel).geometry
    return [Schedule.settle(cache.calibrated(calibration), geometry) for cache in caches]


def _measure(
    config: Experiment,
    settings: CostSettings | PaperSettings,
    model: Path,
    caches: Sequence[Cache | Schedule],
    output: Path,
) -> None:
    full = config.get_cache("full")
    engines = load_shape(model)[0].engines
    configurations = [
        Configuration("full" if engine == "lean" else engine, full, engine) for engine in engines
    ]
    configurations += [Configuration(cache.slug, cache, "lean") for cache in caches]
    workload = Workload(
        model,
        settings.batch,
        make_sampler(config.sampling),
        machine.resolve_precision(config.precision),
        machine.DTYPES[config.storage],
        torch.get_num_threads(),
    )
    content = {
        "batch": settings.batch,
        "precision": machine.dtype_name(workload.precision),
        "storage": config.storage,
        "peak_method": peak_method(),
        "threads": workload.threads,
        "rows": measure(configurations, workload, settings.repeats),
    }
    write_measured(output, content)


def measure_training_cost(config: Experiment, output: Path) -> None:
    """Time a step of training with each cache in the loop, beside full attention.

    Args:
        config: the experiment.
        output: CSV to write.
    """
    rows = measure_training(config.family, config.model, config.training_cost)
    stamp = make_stamp_here()
    write_csv(output, [row | stamp for row in rows])
