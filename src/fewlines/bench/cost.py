"""Time and memory of decoding: every configuration in a process of its own, repeats interleaved.

A configuration is a cache and an engine. Each gets a worker process, which first decodes once
under a watch of its memory; then the workers take turns, one decode each, so that whatever
disturbs the machine disturbs them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.bench import memory
from fewlines.bench.harness import OK, OUT_OF_MEMORY, Worker
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.decode.loop import Watch, decode
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.models.base import Model, State
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress


@dataclass(frozen=True)
class Configuration:
    """What is compared: `name` of the row, the `cache`, the `engine` that reads it."""

    name: str
    cache: Cache | Schedule
    engine: str


@dataclass(frozen=True)
class Workload:
    """What every configuration decodes.

    Attributes:
        model_path: weights of the model.
        batch: images at once.
        sampler: from logits to codes.
        precision: of the products.
        storage: of keys and values; those of a stock cache, as public code does, in `precision`.
        threads: of torch.
    """

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

    Args:
        configurations: what is compared.
        workload: what they decode.
        repeats: timed decodes of each.

    Returns:
        One dict per configuration: `name`, `engine`, `outcome` (`ok`, or `out of memory`, and then
        nothing else but no `seconds`), `kv_bytes` (exact, of the live buffers),
        `peak_bytes` (above the loaded weights), `process_bytes` (peak of the whole process),
        `timeline` (resident bytes above the weights after each step), `seconds` (of each repeat).
    """
    rows: list[dict[str, Any]] = []
    bar = progress("cost", len(configurations) * (repeats + 1), "decodes")
    with ExitStack() as stack:
        workers = []
        for configuration in configurations:  # each warms up alone: their threads would spin
            worker = Worker(configuration.name, Decoding, configuration, workload)
            workers.append(stack.enter_context(closing(worker)))
            row: dict[str, Any] = {"name": configuration.name, "engine": configuration.engine}
            answer = worker.ask("watch_memory")
            row |= {"outcome": answer} if answer == OUT_OF_MEMORY else {"outcome": OK, **answer}
            rows.append({**row, "seconds": []})
            bar.update()
        for _ in range(repeats):
            for worker, row in zip(workers, rows, strict=True):
                if row["outcome"] == OK:
                    answer = worker.ask("take_time")
                    if answer == OUT_OF_MEMORY:  # what was measured does not count any more
                        row |= {"outcome": answer, "seconds": []}
                    else:
                        row["seconds"].append(answer)
                bar.update()
    bar.close()
    return rows


class Decoding:
    """A configuration at work, in a process of its own."""

    def __init__(self, configuration: Configuration, workload: Workload) -> None:
        """Load the model, make it ready and warm up."""
        torch.set_num_threads(workload.threads)
        self.configuration, self.workload = configuration, workload
        model = load_network(workload.model_path, Model).to(machine.device())
        rows = workload.batch * (1 + workload.sampler.guided)
        self.model = model.prepare(workload.precision, rows, consume=True)
        self._decode(batch=1)  # libraries make their pools and caches

    def take_time(self) -> float:
        """Decode a batch; returns its seconds."""
        return machine.take_seconds(lambda: self._decode(self.workload.batch))

    def watch_memory(self) -> dict[str, Any]:
        """Decode a batch; returns its bytes, as `measure_cost` does."""
        kv_bytes, timeline = 0, []

        def watch(step: int, state: State) -> None:
            nonlocal kv_bytes
            kv_bytes = max(kv_bytes, state.bytes)
            timeline.append(memory.resident_bytes())

        memory.reset_peak()
        before = memory.resident_bytes()
        self._decode(self.workload.batch, watch)
        peak = memory.peak_bytes()
        return {
            "kv_bytes": kv_bytes,
            "peak_bytes": peak - before,
            "process_bytes": peak,
            "timeline": [resident - before for resident in timeline],
        }

    def _decode(self, batch: int, watch: Watch | None = None) -> None:
        device, spec = machine.device(), self.model.spec
        engine, workload = self.configuration.engine, self.workload
        decode(
            self.model,
            torch.arange(batch, device=device) % spec.classes,
            draw_noise(0, range(batch), spec.n_tokens).to(device),
            self.configuration.cache,
            workload.sampler,
            engine=engine,
            storage=workload.precision if engine == "stock" else workload.storage,
            watch=watch,
        )


def name_ratios(name: str, slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Pair repeats as `pair_ratios`; returns columns `name`, `name_low` and `name_high`."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), pair_ratios(slow, fast), strict=True))


def pair_ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Pair repeats; returns median and quartiles of their ratios, `(median, low, high)`."""
    ratios = np.asarray(slow) / np.asarray(fast)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(median), float(low), float(high)
