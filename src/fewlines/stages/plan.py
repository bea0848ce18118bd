"""What a decode will cost on a device that is not at hand."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import torch

from fewlines import machine
from fewlines.cache.budget import Budget
from fewlines.cache.placement import Cache, make_policy
from fewlines.cache.placement import cache as make_cache
from fewlines.config import Precision, Storage
from fewlines.errors import FewlinesError
from fewlines.measure import roofline
from fewlines.measure.efficiency import host, largest_batch
from fewlines.measure.operators import DEVICES, Decode, Device, weight_bytes
from fewlines.models.shapes import published_shape


def plan(
    shape: str,
    cache: str,
    device: str = "this",
    grid: int | None = None,
    batch: int = 1,
    guided: bool = False,
    precision: Precision = "auto",
    storage: Storage | None = None,
) -> None:
    """Predict memory and time of a decode: `--shape llamagen-xl --grid 64 --batch 256 --cache
    linear:4lines --device h200`. `guided` counts two rows per image; `--device this` measures the
    machine it runs on first."""
    made = published_shape(shape).on((grid, grid) if grid else published_shape(shape).grid)
    rows = batch * (1 + guided)
    kept = _cache(cache)
    where, dtype = _device(device, made, rows, precision)
    stored = machine.DTYPES[storage] if storage else dtype
    few = Decode(made, rows, kept, dtype.itemsize, stored.itemsize)
    full = replace(few, cache=make_cache("full"))
    print(f"{shape}, {made.grid[0]}×{made.grid[1]} tokens, {batch} images, on {where.name}")
    for name, decode in (("full, lean", full), (cache, few)):
        fits = decode.process_bytes <= where.memory
        print(
            f"  {name:<24} {decode.process_bytes / 1e9:8.2f} GB ({decode.kv_bytes / 1e9:.2f} GB "
            f"keys and values{'' if fits else ', does not fit'}) "
            f"{decode.seconds(where) / batch:9.4f} s/image "
            f"largest batch {largest_batch(decode, where.memory) // (1 + guided)}"
        )
    print(f"  speed-up {full.seconds(where) / few.seconds(where):.2f}")
    print(f"  memory   {full.process_bytes / few.process_bytes:.2f} times less")
    print(f"  {_fitting(few, where, batch)}")


def _device(
    name: str, shape: object, rows: int, precision: Precision
) -> tuple[Device, torch.dtype]:
    if name in DEVICES:
        wanted = torch.bfloat16 if precision == "auto" else machine.DTYPES[precision]
        return DEVICES[name], wanted
    if name != "this":
        raise FewlinesError(f"unknown device '{name}'; write this, {', '.join(DEVICES)}")
    print("measuring this machine …", file=sys.stderr)
    probe = roofline.probe(shape, rows)  # type: ignore[arg-type]
    dtype = machine.resolve_precision(precision)
    return host(probe, machine.dtype_name(dtype), rows), dtype


def _cache(text: str) -> Cache:
    """From `full`, or policy, perhaps `+fold`, and budget: `linear:4lines`, `lines+fold:1/6`."""
    found = re.fullmatch(r"(\w+)(\+fold)?(?::(?:([\d.]+)(lines|tokens)|(\d+/\d+)))?", text)
    if not found:
        raise FewlinesError(f"cache '{text}' is not one of full, linear:4lines, streaming:1/6")
    policy, fold, amount, unit, share = found.groups()
    written = {unit: amount} if amount else {"fraction": share} if share else None
    budget = Budget.parse(written) if written else None
    return Cache(make_policy(policy, {}), budget, bool(fold))


def _fitting(decode: Decode, device: Device, batch: int) -> str:
    """The largest budget, in lines, with which this batch fits."""
    weights = weight_bytes(decode.shape, decode.weight_itemsize)
    height = decode.shape.grid[0]
    for lines in range(height, 0, -1):
        budget = Budget.parse({"lines": lines})
        policy = decode.cache.policy if decode.cache.budget else make_policy("streaming", {})
        if replace(decode, cache=Cache(policy, budget, decode.cache.fold)).process_bytes <= (
            device.memory
        ):
            kept = "the whole image" if lines == height else f"{lines} of {height} lines"
            return f"a cache of {kept} fits beside {batch} images"
    if weights > device.memory:
        return "not even the weights fit"
    return f"no cache fits beside {batch} images; lower the batch"
