"""What will be asked of a device that is not at hand: by a decode, or by a whole experiment."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
import yaml

from fewlines import machine
from fewlines.bench import roofline
from fewlines.bench.efficiency import describe_host, find_largest_batch
from fewlines.bench.jobs import Jobs, Work
from fewlines.bench.passes import count_weights
from fewlines.cache.budget import Budget
from fewlines.cache.spec import make_cache, parse_cache, stand_in
from fewlines.config import load_experiment
from fewlines.devices import DEVICES, Device
from fewlines.errors import FewlinesError
from fewlines.files import write_text
from fewlines.models.base import find_published
from fewlines.report.grids import predict_capacities, read_growth
from fewlines.schema import Precision, Storage
from fewlines.stages.work import find_work

WRITTEN = "# What each job asks of a cluster, counted by 'fewlines plan' for "
SQUARES: list[tuple[int, int]] = [(1024, 1024)] * 8  # layers, where no model's are known


def plan(
    shape: str | None = None,
    cache: str | None = None,
    device: str = "this",
    grid: Annotated[int | None, typer.Option(min=1, help="tokens of a side")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images decoded together")] = 1,
    guided: bool = False,
    precision: Precision = "auto",
    storage: Storage | None = None,
    experiment: list[Path] | None = None,
    cluster: str | None = None,
    profile: Path | None = None,
    growth: Path | None = None,
    loss: Annotated[float, typer.Option(min=1e-6, help="ΔNLL, nats per token")] = 0.01,
) -> None:
    """Predict memory and time of a decode: `--shape llamagen-xl --grid 64 --batch 256 --cache
    line_ar-4lines --device h200`; or hours, memory and jobs of an experiment: `--experiment
    experiments/imagenet.yaml --cluster "8 x h100"`; or what caches must hold on another grid:
    `--growth results/mine/tables/grids.csv --grid 64`.

    Args:
        shape: a published shape.
        cache: its name, as tables' file names write it.
        device: one whose data sheet is known, or `this`, which is measured first.
        grid: tokens of a side; as published where not given.
        batch: images decoded together.
        guided: classifier-free guidance, two rows for each image.
        precision: of the products.
        storage: of keys and values; that of the products where not given.
        experiment: YAML file in place of a shape and a cache; may be given again.
        cluster: devices that its jobs are spread over, as `8 x h100`; this machine if not given.
        profile: folder to write, a profile of Snakemake's with what its jobs ask of a cluster.
        growth: CSV that `snakemake grids` wrote, in place of a shape and a cache.
        loss: that a cache may have on such a grid.
    """
    if growth:
        if grid is None or shape or cache or experiment:
            raise FewlinesError("give --growth and --grid, and neither --shape nor --experiment")
        plan_grid(growth, grid, loss)
    elif experiment:
        if shape or cache:
            raise FewlinesError("give --experiment, or --shape and --cache, not both")
        plan_experiment(experiment, cluster, profile)
    elif shape is None or cache is None or cluster or profile:
        raise FewlinesError(
            "give --shape and --cache, or --experiment, --cluster and --profile, or --growth and "
            "--grid"
        )
    else:
        plan_decode(shape, cache, device, grid, batch, guided, precision, storage)


def plan_decode(
    shape: str,
    cache: str,
    device: str,
    grid: int | None,
    batch: int,
    guided: bool,
    precision: Precision,
    storage: Storage | None,
) -> None:
    """Print memory and time of one decode; arguments as of `plan`."""
    family, published = find_published(shape)
    made = published.on((grid, grid) if grid else published.grid)
    where, dtype = _find_device(device), _resolve(device, precision)
    stored = machine.DTYPES[storage] if storage else dtype
    few = family.Cost(made, batch * (1 + guided), stand_in(parse_cache(cache)), dtype, stored)
    host = where.at(dtype) if where else _measure_host(few, dtype)
    full = replace(few, cache=make_cache("full"))
    print(f"{shape}, {made.grid[0]}×{made.grid[1]} tokens, {batch} images, on {host.name}")
    for name, decode in (("full, lean", full), (cache, few)):
        fits = decode.process_bytes <= host.memory
        print(
            f"  {name:<24} {decode.process_bytes / 1e9:8.2f} GB ({decode.kv_bytes / 1e9:.2f} GB "
            f"keys and values{'' if fits else ', does not fit'}) "
            f"{decode.predict(host) / batch:9.4f} s/image "
            f"largest batch {find_largest_batch(decode, host.memory) // (1 + guided)}"
        )
    print(f"  speed-up {full.predict(host) / few.predict(host):.2f}")
    print(f"  memory   {full.process_bytes / few.process_bytes:.2f} times less")
    print(f"  {_describe_fitting(few, host, batch)}")


def plan_grid(growth: Path, grid: int, loss: float) -> None:
    """Print what each cache must hold on a grid; arguments as of `plan`."""
    fits = read_growth(growth)
    if fits.empty:
        raise FewlinesError(f"{growth} has no row: it takes the same cache on two grids at least")
    found = predict_capacities(fits, grid, loss)
    print(f"For {loss:g} nats/token on {grid}×{grid} tokens, by caches measured on other grids:")
    print(found.to_markdown(index=False, floatfmt=("", "", "", "", ".1f", ".3f")))


def plan_experiment(
    paths: list[Path], cluster: str | None = None, profile: Path | None = None
) -> None:
    """Print hours, memory and jobs of what `snakemake` runs for an experiment; arguments as of
    `plan`."""
    experiment = load_experiment(paths)
    count, name = _read_cluster(cluster)
    where, dtype = _find_device(name), _resolve(name, experiment.precision)
    device = where.at(dtype) if where else _measure_processor(dtype)
    cores = {} if where else {"cores": machine.cores()}
    work = find_work(experiment, device, dtype, **cores)
    jobs = work.list_jobs()
    print(f"{experiment.name} on {count} x {device.name}: {_describe_work(work)}")
    print(_tabulate(jobs).to_markdown(index=False, floatfmt=("", "", ".1f", *[".2f"] * 4)))
    levels = {each.level: 0.0 for each in jobs}
    for each in jobs:
        levels[each.level] += each.last(count)
    number, total = sum(len(each.seconds) for each in jobs), sum(each.total for each in jobs)
    print(
        f"{number} jobs, {total / 3600:.3g} hours of a device, "
        f"{sum(levels.values()) / 3600:.3g} hours on {count}; "
        f"{sum(each.written for each in jobs) / 1e9:.3g} GB written"
    )
    for each in jobs:
        needed = each.device if device.has_memory else each.host
        if needed > device.memory:
            print(
                f"{each.rule} does not fit: it needs {needed / 1e9:.3g} GB and a device has "
                f"{device.memory / 1e9:.3g}; lower its batch"
            )
    print(
        "Counted from the settings, not timed: on processors that were tried good to a factor of "
        "two; of GPUs by their data sheets."
    )
    if profile:
        asked = {each.rule: _ask_for(each) for each in jobs}
        content = yaml.safe_dump({"jobs": count, "set-resources": asked}, sort_keys=False)
        write_text(profile / "profile.yaml", f"{WRITTEN}{experiment.name}.\n{content}")


def _ask_for(jobs: Jobs) -> dict[str, Any]:
    """Resources of a job: twice the time, half as much memory again, and more at each retry."""
    minutes, megabytes = 10 + max(jobs.seconds) / 30, 1.5 * jobs.host / 1e6
    asked = {"runtime": f"{minutes:.0f} * attempt", "mem_mb": f"{megabytes:.0f} * attempt"}
    return asked | ({"gpu": jobs.gpus} if jobs.device else {})


def _read_cluster(cluster: str | None) -> tuple[int, str]:
    """Read how many devices there are, and which."""
    found = re.fullmatch(r"\s*([1-9]\d*)\s*[x×]\s*(\S+)\s*", cluster or "1 x this")
    if not found:
        raise FewlinesError(f"--cluster: '{cluster}' is not a number of devices, as '8 x h100'")
    return int(found[1]), found[2]


def _describe_work(work: Work) -> str:
    height, width = work.network.spec.grid
    parameters = count_weights(work.network)
    images = work.facts.train + work.facts.test
    return (
        f"{images} images of {height}×{width} tokens, {work.network.name} with "
        f"{parameters / 1e6:.3g} M parameters, {machine.dtype_name(work.precision)}"
    )


def _tabulate(jobs: list[Jobs]) -> pd.DataFrame:
    rows = [
        {
            "rule": each.rule,
            "jobs": len(each.seconds),
            "minutes a job, at most": max(each.seconds) / 60,
            "hours": each.total / 3600,
            "memory GB": each.host / 1e9,
            "on the device GB": each.device / 1e9,
            "written GB": each.written / 1e9,
        }
        for each in jobs
    ]
    return pd.DataFrame(rows)


def _measure_processor(dtype: torch.dtype) -> Device:
    """This machine, for products of common size."""
    print("measuring this machine …", file=sys.stderr)
    probe = roofline.probe_layers(SQUARES, 256, 1024)
    return describe_host(probe, machine.dtype_name(dtype))


def _find_device(name: str) -> Device | None:
    """By its data sheet; None for this machine."""
    if name not in (*DEVICES, "this"):
        raise FewlinesError(f"unknown device '{name}'; write this, {', '.join(DEVICES)}")
    return DEVICES.get(name)


def _resolve(device: str, precision: Precision) -> torch.dtype:
    if device in DEVICES and precision == "auto":
        return torch.bfloat16
    return machine.resolve_precision(precision)


def _measure_host(decode: Any, dtype: torch.dtype) -> Device:
    print("measuring this machine …", file=sys.stderr)
    probe = roofline.probe_machine(decode)
    return describe_host(probe, machine.dtype_name(dtype))


def _describe_fitting(decode: Any, device: Device, batch: int) -> str:
    """The largest budget, in lines, with which this batch fits."""
    height, cache = decode.shape.grid[0], decode.cache
    if cache.budget is None:
        cache = make_cache("streaming", lines=1)
    for lines in range(height, 0, -1):
        limited = replace(cache, budget=Budget.parse({"lines": lines}))
        if replace(decode, cache=limited).process_bytes <= device.memory:
            kept = "the whole image" if lines == height else f"{lines} of {height} lines"
            return f"a cache of {kept} fits beside {batch} images"
    if decode.weight_bytes > device.memory:
        return "not even the weights fit"
    return f"no cache fits beside {batch} images; lower the batch"
