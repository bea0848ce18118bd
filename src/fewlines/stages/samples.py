"""Images drawn under each cache."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines import machine
from fewlines.config import BASE, Experiment, SamplingSettings
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.generate.decode import generate as draw
from fewlines.generate.sampler import Sampler
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress
from fewlines.stages.tokens import given_tokens, labels_of, read_tokens


def generate(
    config: Experiment,
    model: Path,
    cache: str,
    shard: int,
    output: Path,
    calibration: Path | None = None,
    row: str = BASE,
    tokens: Path | None = None,
) -> None:
    """Draw one shard of the images of one cache, under every seed; `row` names a task as tables do,
    `base:completion`, whose images begin as those of `tokens`."""
    limited = config.cache(cache).calibrated(calibration)
    network = load_network(model, Transformer).to(machine.device())
    sampling = config.sampling_of(row)
    edges = [sampling.samples * part // sampling.shards for part in range(sampling.shards + 1)]
    numbers = range(edges[shard], edges[shard + 1])
    labels, given = torch.tensor(numbers) % network.shape.classes, None
    task = config.task(row)
    if task and task.given:
        if tokens is None:
            raise FewlinesError(f"{row} completes images; --tokens names the file that has them")
        tensors, _ = read_tokens(tokens, network.shape)
        images = torch.tensor(numbers) % len(tensors["test_codes"])
        labels = tensors["test_labels"][images]
        given = tensors["test_codes"][images, : given_tokens(task, network)].long()
    if task:
        labels = labels_of(task, network, labels)
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
            given=given,
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
    """The sampler of the settings."""
    return Sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.guidance)
