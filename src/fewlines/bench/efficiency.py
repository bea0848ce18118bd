"""What decoding costs at a published shape: steps timed where they differ, and added up.

A setting is a shape, a grid, a batch and a precision; its rows are the caches and engines that are
compared there. They take turns, so that whatever disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import bisect
import gc
import itertools
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.bench import memory, roofline
from fewlines.bench.harness import OK, OUT_OF_MEMORY, Worker
from fewlines.bench.steps import (
    DecodeSteps,
    Row,
    Setting,
    list_positions,
    make_peer,
    make_random_model,
)
from fewlines.cache.spec import make_cache
from fewlines.config.settings import EfficiencyRun, EfficiencySettings
from fewlines.devices import Device
from fewlines.files import read_json, write_json
from fewlines.models.base import find_published
from fewlines.progress import progress

CARDS = (24, 80)  # GB: what of a batch fits them, by computation
RESERVE = 1.0e9  # bytes that a measurement leaves free
PROBE_SECONDS = 600  # more than any machine needs


def measure_setting(
    setting: Setting,
    repeats: int,
    stamp: dict[str, str] | None = None,
    part: Path | None = None,
) -> dict[str, Any]:
    """Measure all rows of a setting, in turns.

    Args:
        setting: where they are compared.
        repeats: measurements of each.
        stamp: commit, machine and versions.
        part: a file of what is done so far. A measurement that was killed goes on from it, where
            code, machine and setting are the same; a round that was not finished begins anew.

    Returns:
        `probes` of the machine by batch, the best of one before and one after; what the setting is,
        and for each row `outcome` (`ok`, `out of memory`, `time limit`), `kv_bytes`, `peak_bytes`
        (above the weights), `seconds` (of an image, each repeat), `steps` (seconds of a step at
        each position, each repeat), `full_run_seconds`.
    """
    result = _begin(setting, stamp or {}, part)
    rows, probes = result["rows"], result["probes"]
    begun = {row["batch"] for row in rows if row["outcome"] != OUT_OF_MEMORY}
    batches = sorted(begun | {int(batch) for batch in probes})
    total = 2 * len(batches) + len(rows) * repeats
    bar = progress(setting.shape_name, total, "measurements")

    def finish() -> None:
        if part:
            write_json(part, result)
        bar.update()

    with closing(Workers(setting)) as workers:
        for batch in batches:
            if str(batch) not in probes:
                answer = workers.ask(PROBE_SECONDS, "probe", batch)
                if isinstance(answer, str):  # there is nothing to compare its rows with
                    for row in (each for each in rows if each["batch"] == batch):
                        row["outcome"] = answer
                else:
                    probes[str(batch)] = answer
            finish()
        for repeat in range(repeats):
            for row, found in zip(setting.rows, rows, strict=True):
                if found["outcome"] == OK and len(found["seconds"]) == repeat:
                    whole = setting.full_run and repeat == 0
                    _add(found, workers.ask(setting.limit_seconds, "measure", row, whole))
                finish()
        for batch in probes:  # what the machine can do is the best that it did
            again = workers.ask(PROBE_SECONDS, "probe", int(batch))
            if not isinstance(again, str):
                probes[batch] = roofline.keep_best(probes[batch], again)
            bar.update()
    bar.close()
    return result


def _begin(setting: Setting, stamp: dict[str, str], part: Path | None) -> dict[str, Any]:
    """What was done of a setting by the same code; nothing where no commit tells the code."""
    blank = _blank_setting(setting) | {"measured": stamp}
    commit = stamp.get("commit", "")
    if part is None or not part.exists() or not commit or commit.endswith("+"):
        return blank
    begun: dict[str, Any] = read_json(part)
    if _identify(begun) != _identify(blank):
        return blank
    going = [row for row in begun["rows"] if row["outcome"] == OK]
    rounds = min((len(row["seconds"]) for row in going), default=0)
    for row in going:
        row["seconds"], row["steps"] = row["seconds"][:rounds], row["steps"][:rounds]
    return begun


def _blank_setting(setting: Setting) -> dict[str, Any]:
    return {
        "shape": setting.shape_name,
        "grid": list(setting.shape.grid),
        "n_tokens": setting.shape.geometry.n_tokens,
        "dtype": machine.dtype_name(setting.precision),
        "memory_cap": setting.cap,
        "gpu": machine.gpu(),
        "processor": machine.processor(),
        "instructions": machine.instructions(),
        "cores": machine.cores(),
        "torch": torch.__version__,
        "peak_method": memory.peak_method(),
        "threads": setting.threads,
        "limit_seconds": setting.limit_seconds,
        "full_run": setting.full_run,
        "compilers": machine.list_compilers(),
        "probes": {},
        "rows": [_blank(setting, row) for row in setting.rows],
    }


def _identify(result: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for a measurement to go on."""
    told = ("engine", "policy", "budget", "batch", "storage", "kv_bytes")
    rows = [[row[key] for key in told] for row in result["rows"]]
    return {**result, "rows": rows, "probes": None}


def _blank(setting: Setting, row: Row) -> dict[str, Any]:
    decode = setting.predict(row)
    fits = decode.process_bytes < machine.available_bytes() - RESERVE
    return {
        "engine": row.engine,
        "policy": row.cache.policy_text,
        "budget": row.cache.budget_text,
        "batch": row.batch,
        "storage": machine.dtype_name(row.storage),
        "outcome": OK if fits else OUT_OF_MEMORY,
        "mean_read_bytes": decode.average_bytes(),
        "kv_bytes": decode.kv_bytes,
        "predicted_peak_bytes": decode.peak_bytes,
        **{f"batch_{gb}gb": find_largest_batch(decode, gb * 1e9) for gb in CARDS},
        "seconds": [],
        "steps": [],
    }


def _add(result: dict[str, Any], answer: dict[str, Any] | str) -> None:
    if isinstance(answer, str):
        result["outcome"] = answer
        return
    for key in ("seconds", "steps"):
        result[key].append(answer.pop(key))
    result |= {key: value for key, value in answer.items() if key not in result}


class Workers:
    """The processes that answer: one for each question, as a process's memory has one peak. A GPU's
    is counted anew each time, so there one answers all, and its library is loaded once."""

    def __init__(self, setting: Setting) -> None:
        """Start none yet."""
        self.setting, self.shared = setting, machine.device().type == "cuda"
        self.worker: Worker | None = None

    def ask(self, limit: float, question: str, *arguments: Any) -> Any:
        """Ask a `Measurement`; the answer, or what became of it."""
        if self.worker is None:
            self.worker = Worker(self.setting.shape_name, Measurement, self.setting)
        answer = self.worker.ask(question, *arguments, limit=limit)
        if not self.shared or isinstance(answer, str):
            self.close()
        return answer

    def close(self) -> None:
        """End the process that is left."""
        if self.worker:
            self.worker.close()
        self.worker = None


class Measurement:
    """A setting at work, in a process of its own."""

    def __init__(self, setting: Setting) -> None:
        """Take the threads of the setting."""
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.steps: Callable[[Row], Any] | None = None
        self.steps_of: tuple[str, int] | None = None

    def make_steps(self, row: Row) -> Callable[[Row], Any]:
        """What decodes rows like this one. The model is made anew for another batch, or for another
        engine of transformers: what they do to a model stays."""
        peer = row.engine.startswith("hf")
        wanted = (row.engine if peer else "ours", row.batch)
        if self.steps is None or self.steps_of != wanted:
            self.steps = None
            gc.collect()
            if peer:
                self.steps = make_peer(self.setting)
            else:
                model = make_random_model(self.setting, row.batch)
                self.steps = partial(DecodeSteps, model, self.setting)
            self.steps_of = wanted
        return self.steps

    def probe(self, batch: int) -> dict[str, Any]:
        """Measure what the machine can do at best for a batch."""
        setting = self.setting
        row = replace(setting.rows[0], batch=batch)
        return roofline.probe_machine(setting.predict(row))

    @torch.inference_mode()
    def measure(self, row: Row, whole: bool) -> dict[str, Any]:
        """Measure a row once, and a whole image too where `whole`."""
        setting, steps = self.setting, self.make_steps(row)
        steps(replace(row, batch=1)).seconds(0)  # libraries make their pools, kernels are compiled
        memory.reset_peak()
        before = memory.resident_bytes()
        stepper = steps(row)
        positions = list_positions(setting, row)
        seconds = {position: stepper.seconds(position) for position in positions}
        n_tokens = setting.shape.geometry.n_tokens
        mean = np.trapezoid(list(seconds.values()), positions) / (positions[-1] - positions[0])
        result = {
            "seconds": float(mean) * n_tokens / row.batch,
            "steps": seconds,
            "peak_bytes": memory.peak_bytes() - before,
        }
        if isinstance(stepper, DecodeSteps) and machine.device().type == "cpu":
            result["profile"] = stepper.profile(positions[-1])
        if whole:
            result["full_run_seconds"] = stepper.whole() / row.batch
        return result


def find_largest_batch(decode: Any, cap: float) -> int:
    """Find the rows that fit into `cap` bytes, weights included; 0 if none does."""
    most = max(1, int(cap // (decode.kv_bytes // decode.rows)))
    rows = range(1, most + 1)
    return bisect.bisect_right(rows, cap, key=lambda n: replace(decode, rows=n).process_bytes)


def describe_host(probe: dict[str, Any], precision: str) -> Device:
    """Describe this machine, as a probe of it found it for the batch that it was asked about."""
    # Of a precision that the machine has no instructions for, no rate was measured: it is no bound.
    rate = max(probe["linear_rates"].get(precision, {"none": np.nan}).values())
    return Device(
        machine.processor(),
        probe["bandwidth"],
        rate,
        machine.available_bytes(),
        probe["operator_seconds"],
        has_memory=machine.device().type != "cpu",
    )


def make_settings(efficiency: EfficiencySettings, threads: int) -> dict[str, Setting]:
    """Make every setting of an experiment, by the name its file has."""
    made: dict[str, Setting] = {}
    for run in efficiency.runs:
        precision = machine.resolve_precision(run.precision)
        for grid, (batch, cap) in itertools.product(
            run.grids,
            [*((batch, None) for batch in run.batches), *((None, cap) for cap in run.caps)],
        ):
            family, published = find_published(run.shape)
            shape = published.on((grid, grid))
            setting = Setting(
                run.shape,
                family,
                shape,
                precision,
                (),
                run.full_run,
                efficiency.limit_seconds,
                threads,
                None if cap is None else cap * 1e9,
            )
            size = f"batch{batch}" if batch else f"{cap:g}gb"
            # As it is written: `auto` is another precision on the machine that plans the run.
            name = f"{run.shape}-{grid}x{grid}-{size}-{run.precision}-{run.storage}"
            alike = sum(other.startswith(name) for other in made)
            name += f"-{alike + 1}" if alike else ""
            made[name] = replace(setting, rows=_rows(run, setting, batch))
    return made


def _rows(run: EfficiencyRun, setting: Setting, batch: int | None) -> tuple[Row, ...]:
    storage = machine.DTYPES[run.storage]
    # Public code keeps keys and values in the precision that it multiplies in.
    rows = [
        Row(engine, make_cache("full"), 1, storage if engine == "lean" else setting.precision)
        for engine in run.engines
    ]
    rows += [
        Row(engine, settings.build(), 1, storage)
        for settings in run.caches
        for engine in run.cache_engines
    ]
    if batch is not None:
        return tuple(replace(row, batch=batch) for row in rows)
    assert setting.cap is not None
    fitting = [
        replace(row, batch=find_largest_batch(setting.predict(row), setting.cap)) for row in rows
    ]
    return tuple(row for row in fitting if row.batch)
