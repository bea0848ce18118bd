"""Images drawn under each cache."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines import machine
from fewlines.config import Experiment, SamplingSettings
from fewlines.files import read_tensors, write_tensors
from fewlines.generate.decode import generate as draw
from fewlines.generate.sampler import Sampler
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress


def generate(
    config: Experiment,
    model: Path,
    cache: str,
    shard: int,
    output: Path,
    calibration: Path | None = None,
) -> None:
    """Draw one shard of the images of one cache, under every seed."""
    limited = config.cache(cache).calibrated(calibration)
    network = load_network(model, Transformer).to(machine.device())
    sampling = config.sampling
    edges = [sampling.samples * part // sampling.shards for part in range(sampling.shards + 1)]
    numbers = range(edges[shard], edges[shard + 1])
    labels = torch.tensor(numbers) % network.shape.classes
    bar = progress(f"generate {cache} {shard}", len(numbers) * len(sampling.seeds), "images")
    codes = {
        f"seed_{seed}": draw(
            network,
            labels,
            limited,
            seed,
            first=numbers.start,
            batch=sampling.batch,
            sampler=sampler(sampling),
            precision=machine.resolve_precision(config.precision),
            storage=machine.DTYPES[config.storage],
            done=bar.update,
        ).to("cpu", torch.int32)
        for seed in sampling.seeds
    }
    bar.close()
    write_tensors(output, {**codes, "labels": labels}, {"grid": network.shape.grid})


def gather(shards: list[Path], output: Path) -> None:
    """Put the shards of a cache's images together again."""
    parts = [read_tensors(shard) for shard in shards]
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    write_tensors(output, tensors, parts[0][1])


def sampler(sampling: SamplingSettings) -> Sampler:
    return Sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.guidance)
