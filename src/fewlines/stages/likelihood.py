"""Likelihood of held-out images under each cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewlines import machine
from fewlines.cache.spec import Cache
from fewlines.config import BASE, Experiment
from fewlines.config.settings import TaskSettings
from fewlines.errors import FewlinesError
from fewlines.files import write_json
from fewlines.metrics.likelihood import (
    Likelihood,
    compare_storages,
    measure_likelihoods,
    name_interval,
)
from fewlines.models.base import Model
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.report.provenance import write_measured
from fewlines.stages.tokens import choose_labels, count_prompt, read_tokens

STORAGE_IMAGES = 200  # decoded token by token, in every storage


def measure_model(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Measure nats per token of the model itself, with a full cache, on test images.

    Args:
        config: the experiment.
        model: weights.
        tokens: that `tokenize` wrote.
        output: JSON to write.
    """
    full, count = config.get_cache("full"), config.likelihood.test_images
    (found,) = _measure(config, model, tokens, [full], count)
    write_measured(output, {"nll": found.nll.mean().item(), "images": len(found.nll)})


def measure_likelihood(
    config: Experiment,
    model: Path,
    tokens: Path,
    cache: list[str],
    output: list[Path],
    calibration: Path | None = None,
    row: str = BASE,
) -> None:
    """Measure nats per token under caches, against the full cache on the same held-out images.

    Args:
        config: the experiment.
        model: weights.
        tokens: that `tokenize` wrote.
        cache: its name in the experiment; given again for each.
        output: JSON to write; given again for each, in the same order.
        calibration: of the base model, for caches that go by one.
        row: a task as tables name it, `base:completion`.
    """
    if len(cache) != len(output):
        raise FewlinesError(f"--cache is given {len(cache)} times, --output {len(output)} times")
    limited = [config.get_cache(slug).calibrated(calibration) for slug in cache]
    count, task = config.likelihood.images, config.get_task(row)
    every = _measure(config, model, tokens, limited, count, task)
    for found, path in zip(every, output, strict=True):
        write_measured(path, found.summarise())


def measure_storage(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Measure what keeping keys and values in 16 bits changes, under a full cache.

    Args:
        config: the experiment.
        model: weights.
        tokens: that `tokenize` wrote.
        output: JSON to write.
    """
    network = load_network(model, Model).to(machine.device())
    tensors, _ = read_tokens(tokens, network.spec)
    first = slice(min(STORAGE_IMAGES, config.likelihood.images))
    labels, codes = tensors["test_labels"][first], tensors["test_codes"][first]
    storages = {name: machine.DTYPES[name] for name in ("float16", "bfloat16")}
    agreements = compare_storages(network, labels, codes, list(storages.values()))
    rows = [
        {
            "storage": name,
            "images": len(labels),
            **name_interval("nll_delta", found.nll_delta),
            "equal_tokens": found.equal_tokens,
            "equal_before": found.equal_before,
        }
        for name, found in zip(storages, agreements, strict=True)
    ]
    write_json(output, rows)


def _measure(
    config: Experiment,
    model: Path,
    tokens: Path,
    caches: Sequence[Cache],
    count: int | None,
    task: TaskSettings | None = None,
) -> list[Likelihood]:
    """Under caches, on the first `count` test images."""
    network = load_network(model, Model).to(machine.device())
    tensors, _ = read_tokens(tokens, network.spec)
    labels, codes = tensors["test_labels"][:count], tensors["test_codes"][:count]
    prompt = 0
    if task:
        labels, prompt = choose_labels(task, network, labels), count_prompt(task, network)
    bar = progress("likelihood", len(labels) * len(caches), "images")
    batch = config.likelihood.batch
    found = measure_likelihoods(network, labels, codes, caches, batch, bar.update, prompt)
    bar.close()
    return found
