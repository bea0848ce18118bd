"""Likelihood of held-out images under each cache."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fewlines import machine
from fewlines.cache.placement import Cache
from fewlines.config import BASE, Experiment, TaskSettings
from fewlines.files import write_json, write_text
from fewlines.measure.likelihood import Likelihood, named_interval, storage_agreement
from fewlines.measure.likelihood import measure_likelihood as likelihood_under
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress
from fewlines.stages.tokens import given_tokens, labels_of, read_tokens

STORAGE_IMAGES = 200  # decoded token by token, in every storage


def measure_model(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Nats per token of the model itself, with a full cache, on all test images."""
    full = config.cache("full")
    found = _measure(config, model, tokens, full, config.likelihood.test_images)
    write_json(output, {"nll": found.nll.mean().item(), "images": len(found.nll)})


def measure_likelihood(
    config: Experiment,
    model: Path,
    tokens: Path,
    cache: str,
    output: Path,
    calibration: Path | None = None,
    row: str = BASE,
) -> None:
    """Nats per token under a cache, against the full cache on the same held-out images; `row` names
    a task as tables do, `base:completion`."""
    limited, count = config.cache(cache).calibrated(calibration), config.likelihood.images
    found = _measure(config, model, tokens, limited, count, config.task(row))
    summary = {
        "images": len(found.nll),
        "nll": found.nll.mean().item(),
        **named_interval("nll_delta", found.nll - found.nll_full),
        "kl": found.kl.double().mean().item(),
        "kl_by_line": found.kl_by_line().tolist(),
        "nll_of_images": found.nll.tolist(),
    }
    write_json(output, summary)


def measure_on_training(
    config: Experiment, model: Path, tokens: Path, output: Path, calibration: Path | None = None
) -> None:
    """A table of likelihoods on training images, those after the calibration's, of all caches of
    the experiment: what choices are made on, so that test images choose nothing."""
    network = load_network(model, Transformer).to(machine.device())
    tensors, _ = read_tokens(tokens, network.shape)
    first = config.calibration.images + config.calibration.curve_images
    held = slice(first, first + config.likelihood.images)
    labels, codes = tensors["train_labels"][held], tensors["train_codes"][held]
    caches = list(config.cache_by_slug.values())
    bar = progress("likelihood on training images", len(caches) * len(labels), "images")
    rows = []
    for cache in caches:
        limited, batch = cache.calibrated(calibration), config.likelihood.batch
        found = likelihood_under(network, labels, codes, limited, batch, bar.update)
        geometry = network.shape.geometry
        rows.append(
            {
                "policy": cache.policy_text,
                "budget": cache.budget_text,
                "capacity": geometry.prefix + cache.tokens(geometry),
                "nll": found.nll.mean().item(),
                **named_interval("nll_delta", found.nll - found.nll_full),
                "likelihood_images": len(labels),
            }
        )
    bar.close()
    write_text(output, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))


def measure_storage(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """What keeping keys and values in 16 bits changes, under a full cache."""
    network = load_network(model, Transformer).to(machine.device())
    tensors, _ = read_tokens(tokens, network.shape)
    first = slice(min(STORAGE_IMAGES, config.likelihood.images))
    labels, codes = tensors["test_labels"][first], tensors["test_codes"][first]
    storages = {name: machine.DTYPES[name] for name in ("float16", "bfloat16")}
    agreements = storage_agreement(network, labels, codes, list(storages.values()))
    rows = [
        {
            "storage": name,
            "images": len(labels),
            **named_interval("nll_delta", found.nll_delta),
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
    cache: Cache,
    count: int | None,
    task: TaskSettings | None = None,
) -> Likelihood:
    """Under a cache, on the first `count` test images."""
    network = load_network(model, Transformer).to(machine.device())
    tensors, _ = read_tokens(tokens, network.shape)
    labels, codes = tensors["test_labels"][:count], tensors["test_codes"][:count]
    given = 0
    if task:
        labels, given = labels_of(task, network, labels), given_tokens(task, network)
    bar = progress(f"likelihood {cache.slug}", len(labels), "images")
    found = likelihood_under(
        network, labels, codes, cache, config.likelihood.batch, bar.update, given
    )
    bar.close()
    return found
