"""Time and memory of decoding: every configuration in a process of its own, repeats interleaved.

A configuration is a cache and an engine. Each gets a worker process, which first decodes once
under a watch of its memory; then the workers take turns, one decode each, so that whatever
disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.cache.buffer import BoundedCache, Engine
from fewlines.cache.placement import Cache
from fewlines.errors import FewlinesError
from fewlines.generate.decode import decode
from fewlines.generate.packed import prepare
from fewlines.generate.sampler import Sampler, draw_noise
from fewlines.measure import memory
from fewlines.measure.outcome import (
    OK,
    OUT_OF_MEMORY,
    first_to_go,
    or_out_of_memory,
    ran_out_of_memory,
)
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress


@dataclass(frozen=True)
class Configuration:
    """Attributes: `name` of the row, the `cache`, the `engine` that reads it."""

    name: str
    cache: Cache
    engine: Engine


@dataclass(frozen=True)
class Workload:
    """What every configuration decodes: `batch` images at once of the model at `model_path`,
    multiplied in `precision`, keys and values kept in `storage`; those of a stock cache, as public
    code does, in `precision`."""

    model_path: Path
    batch: int
    sampler: Sampler
    precision: torch.dtype
    storage: torch.dtype
    threads: int


def measure_cost(
    configurations: Sequence[Configuration], workload: Workload, repeats: int
) -> list[dict[str, Any]]:
    """Measure all configurations side by side.

    Returns:
        One dict per configuration: `name`, `engine`, `outcome` (`ok`, or `out of memory`, and then
        nothing else but no `seconds`), `kv_bytes` (exact, of the live buffers),
        `peak_bytes` (above the loaded weights), `process_bytes` (peak of the whole process),
        `timeline` (resident bytes above the weights after each step), `seconds` (of each repeat).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # a worker starts in no time
    workers = []
    rows: list[dict[str, Any]] = []
    bar = progress("cost", len(configurations) * (repeats + 1), "decodes")
    try:
        for configuration in configurations:  # each warms up alone: their threads would spin
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, configuration, workload), daemon=True
            )
            process.start()
            theirs.close()
            workers.append((process, ours))
            row: dict[str, Any] = {"name": configuration.name, "engine": configuration.engine}
            answer = _ask(process, ours, "memory", configuration)
            row |= {"outcome": answer} if answer == OUT_OF_MEMORY else {"outcome": OK, **answer}
            rows.append({**row, "seconds": []})
            bar.update()
        for _ in range(repeats):
            for worker, row, configuration in zip(workers, rows, configurations, strict=True):
                if row["outcome"] == OK:
                    answer = _ask(*worker, "time", configuration)
                    if answer == OUT_OF_MEMORY:  # what was measured does not count any more
                        row |= {"outcome": answer, "seconds": []}
                    else:
                        row["seconds"].append(answer)
                bar.update()
    finally:
        bar.close()
        for process, pipe in workers:
            pipe.close()  # a worker ends when nobody asks any more
            process.join(timeout=10)
            process.kill()
    return rows


def _ask(
    process: BaseProcess, pipe: Connection, question: str, configuration: Configuration
) -> Any:
    try:
        pipe.send(question)
        return pipe.recv()
    except (EOFError, ConnectionError, BrokenPipeError):
        if ran_out_of_memory(process):
            return OUT_OF_MEMORY
        raise FewlinesError(
            f"cost: the process of {configuration.name} ended with status {process.exitcode}"
        ) from None


def _work(pipe: Connection, configuration: Configuration, workload: Workload) -> None:
    first_to_go()
    torch.set_num_threads(workload.threads)
    model = load_network(workload.model_path, Transformer).to(machine.device())
    rows = workload.batch * (1 + workload.sampler.guided)
    model = prepare(model, workload.precision, rows, consume=True)
    _decode(configuration, workload, model, batch=1)  # libraries make their pools and caches
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        work = {"memory": _memory, "time": _time}[question]
        pipe.send(or_out_of_memory(work, configuration, workload, model))


def _time(configuration: Configuration, workload: Workload, model: Transformer) -> float:
    machine.synchronise()
    start = time.perf_counter()
    _decode(configuration, workload, model, workload.batch)
    machine.synchronise()
    return time.perf_counter() - start


def _memory(configuration: Configuration, workload: Workload, model: Transformer) -> dict[str, Any]:
    kv_bytes, timeline = 0, []

    def watch(step: int, buffers: BoundedCache) -> None:
        nonlocal kv_bytes
        kv_bytes = max(kv_bytes, buffers.bytes)
        timeline.append(memory.resident_bytes())

    memory.reset_peak()
    before = memory.resident_bytes()
    _decode(configuration, workload, model, workload.batch, watch)
    peak = memory.peak_bytes()
    return {
        "kv_bytes": kv_bytes,
        "peak_bytes": peak - before,
        "process_bytes": peak,
        "timeline": [resident - before for resident in timeline],
    }


def _decode(
    configuration: Configuration,
    workload: Workload,
    model: Transformer,
    batch: int,
    watch: Any = None,
) -> None:
    device = machine.device()
    labels = torch.arange(batch, device=device) % model.shape.classes
    noise = draw_noise(0, range(batch), model.shape.geometry.n_tokens).to(device)
    decode(
        model,
        labels,
        noise,
        configuration.cache,
        workload.sampler,
        engine=configuration.engine,
        storage=workload.precision if configuration.engine == "stock" else workload.storage,
        watch=watch,
    )


def ratio_interval(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of paired repeats: `(median, low, high)`."""
    ratios = np.asarray(slow) / np.asarray(fast)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(median), float(low), float(high)
