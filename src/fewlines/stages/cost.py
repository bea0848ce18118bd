"""Time and memory of each cache, beside both full caches."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines import machine
from fewlines.cache.placement import Cache
from fewlines.config import Experiment
from fewlines.files import write_json
from fewlines.measure.cost import Configuration, Workload
from fewlines.measure.cost import measure_cost as measure
from fewlines.measure.memory import peak_method
from fewlines.stages.samples import sampler


def measure_cost(
    config: Experiment, model: Path, cache: str, output: Path, calibration: Path | None = None
) -> None:
    """Time and memory of one cache beside both full caches, interleaved in one run."""
    limited = config.cache(cache).calibrated(calibration)
    _write_cost(config, model, limited, config.cost.batch, config.cost.repeats, output)


def measure_paper(
    config: Experiment, model: Path, output: Path, calibration: Path | None = None
) -> None:
    """The paper's comparison, at a batch where the cache is what fills memory."""
    limited = config.cache(config.paper.cache).calibrated(calibration)
    _write_cost(config, model, limited, config.paper.batch, config.paper.repeats, output)


def _write_cost(
    config: Experiment, model: Path, cache: Cache, batch: int, repeats: int, output: Path
) -> None:
    full = config.cache("full")
    configurations = [Configuration("full", full, "lean"), Configuration("stock", full, "stock")]
    if cache.slug != "full":
        configurations.append(Configuration(cache.slug, cache, "lean"))
    precision = machine.resolve_precision(config.precision)
    storage = machine.DTYPES[config.storage]
    threads = torch.get_num_threads()
    workload = Workload(model, batch, sampler(config.sampling), precision, storage, threads)
    rows = measure(configurations, workload, repeats)
    content = {
        "cache": cache.slug,
        "batch": batch,
        "precision": machine.dtype_name(precision),
        "storage": config.storage,
        "peak_method": peak_method(),
        "threads": workload.threads,
        "rows": rows,
    }
    write_json(output, content)
