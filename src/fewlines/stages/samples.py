"""Images drawn under each cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fewlines import machine
from fewlines.config import BASE, Experiment
from fewlines.config.settings import SamplingSettings
from fewlines.decode.loop import generate as draw
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.models.base import Model
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.stages.tokens import choose_labels, count_prompt, read_tokens


def generate(
    config: Experiment,
    model: Path,
    cache: str,
    shard: Annotated[int, typer.Option(min=0, help="which part of the images, from 0")],
    output: Path,
    calibration: Path | None = None,
    row: str = BASE,
    tokens: Path | None = None,
) -> None:
    """Draw one shard of the images of one cache, under every seed.

    Args:
        config: the experiment.
        model: weights.
        cache: its name in the experiment.
        shard: which part of the images.
        output: safetensors file to write.
        calibration: of the base model, for caches that go by one.
        row: a task as tables name it, `base:completion`.
        tokens: whose images a completion begins with.
    """
    limited = config.get_cache(cache).calibrated(calibration)
    network = load_network(model, Model).to(machine.device())
    sampling = config.get_sampling(row)
    if shard >= sampling.shards:
        raise FewlinesError(f"--shard {shard}: there are {sampling.shards}, from 0")
    edges = [sampling.samples * part // sampling.shards for part in range(sampling.shards + 1)]
    numbers = range(edges[shard], edges[shard + 1])
    labels, prompt = torch.tensor(numbers) % network.spec.classes, None
    task = config.get_task(row)
    if task and task.prompt_lines:
        if tokens is None:
            raise FewlinesError(f"{row} completes images; --tokens names the file that has them")
        tensors, _ = read_tokens(tokens, network.spec)
        images = torch.tensor(numbers) % len(tensors["test_codes"])
        labels = tensors["test_labels"][images]
        prompt = tensors["test_codes"][images, : count_prompt(task, network)].long()
    if task:
        labels = choose_labels(task, network, labels)
    bar = progress(f"generate {cache} {shard}", len(numbers) * len(sampling.seeds), "images")
    codes = {
        f"seed_{seed}": draw(
            network,
            labels,
            limited,
            seed,
            first=numbers.start,
            batch=sampling.batch,
            sampler=make_sampler(sampling),
            precision=machine.resolve_precision(config.precision),
            storage=machine.DTYPES[config.storage],
            prompt=prompt,
            done=bar.update,
        ).to("cpu", torch.int32)
        for seed in sampling.seeds
    }
    bar.close()
    write_tensors(output, {**codes, "labels": labels}, {"grid": network.spec.grid})


def gather(shard: list[Path], output: Path) -> None:
    """Put the shards of a cache's images together again.

    Args:
        shard: a file that `generate` wrote; given again for each, in order.
        output: safetensors file to write.
    """
    parts = [read_tensors(each) for each in shard]
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    write_tensors(output, tensors, parts[0][1])


def make_sampler(sampling: SamplingSettings) -> Sampler:
    """Make the sampler of the settings."""
    return Sampler(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.guidance,
        sampling.guided_tokens,
    )
