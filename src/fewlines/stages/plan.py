"""What a decode will cost on a device that is not at hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from fewlines import machine
from fewlines.bench import roofline
from fewlines.bench.efficiency import describe_host, find_largest_batch
from fewlines.cache.budget import Budget
from fewlines.cache.policy import ScoringPolicy
from fewlines.cache.spec import Cache, make_cache, make_policy, parse_cache
from fewlines.devices import DEVICES, Device
from fewlines.errors import FewlinesError
from fewlines.models.base import find_published
from fewlines.schema import Precision, Storage


def plan(
    shape: str,
    cache: str,
    device: str = "this",
    grid: Annotated[int | None, typer.Option(min=1, help="tokens of a side")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images decoded together")] = 1,
    guided: bool = False,
    precision: Precision = "auto",
    storage: Storage | None = None,
) -> None:
    """Predict memory and time of a decode: `--shape llamagen-xl --grid 64 --batch 256 --cache
    line_ar-4lines --device h200`.

    Args:
        shape: a published shape.
        cache: its name, as tables' file names write it.
        device: one whose data sheet is known, or `this`, which is measured first.
        grid: tokens of a side; as published where not given.
        batch: images decoded together.
        guided: classifier-free guidance, two rows for each image.
        precision: of the products.
        storage: of keys and values; that of the products where not given.
    """
    family, published = find_published(shape)
    made = published.on((grid, grid) if grid else published.grid)
    where, dtype = _find_device(device), _resolve(device, precision)
    stored = machine.DTYPES[storage] if storage else dtype
    few = family.Cost(made, batch * (1 + guided), _stand_in(parse_cache(cache)), dtype, stored)
    host = where or _measure_host(few, dtype)
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


def _stand_in(cache: Cache) -> Cache:
    """A cache that costs as much and needs no calibration of a model: it is victims and shares
    that a calibration decides, not how many entries there are."""
    if not cache.requires:
        return cache
    scores = isinstance(cache.policy, ScoringPolicy)
    policy = make_policy("line_ar" if scores else "streaming", {})
    return replace(cache, policy=policy, allocation="uniform")


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
    return describe_host(probe, machine.dtype_name(dtype), decode.rows)


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
