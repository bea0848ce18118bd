"""The schedule's calibration: a minute, once per model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from fewlines.config import Experiment
from fewlines.files import write_text
from fewlines.measure.attention import expected_attention
from fewlines.measure.budgets import measure_curves, rooms_of
from fewlines.measure.likelihood import measure_likelihood, named_interval
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens

COUNTS = (1, 4, 16, 64)  # images of the curve, before all of them


def calibrate(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Measure where each head looks, on the first training images, and what each
    head loses when it is limited, on those that follow."""
    network = load_network(model, Transformer)
    tensors, _ = read_tokens(tokens, network.shape)
    count = config.calibration.images
    labels, codes = tensors["train_labels"][:count], tensors["train_codes"][:count]
    bar = progress("calibrate", len(labels), "images")
    found = expected_attention(network, labels, codes, config.calibration.batch, bar.update)
    bar.close()
    after = slice(count, count + config.calibration.curve_images)
    labels, codes = tensors["train_labels"][after], tensors["train_codes"][after]
    geometry = network.shape.geometry
    heads = (len(rooms_of(geometry.n_tokens)) - 1) * geometry.layers * geometry.heads
    bar = progress("what each head loses", heads, "rooms")
    curves = measure_curves(network, labels, codes, found, bar.update)
    bar.close()
    replace(found, curves=curves).save(output)


def calibration_curve(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """What a schedule loses that was calibrated on fewer images, or on those of one class, for
    every calibrated cache of the experiment."""
    network = load_network(model, Transformer)
    tensors, _ = read_tokens(tokens, network.shape)
    labels, codes = tensors["train_labels"], tensors["train_codes"]
    most = config.calibration.images
    chosen = {f"first {count}": torch.arange(count) for count in (*COUNTS, most)}
    chosen[f"{most} of class 0"] = torch.nonzero(labels == 0).flatten()[:most]
    # Splits by what each head loses need more than expected attention.
    caches = [
        cache
        for cache in config.cache_by_slug.values()
        if cache.needs_calibration and cache.split == "uniform"
    ]
    images = config.likelihood.images
    test = (tensors["test_labels"][:images], tensors["test_codes"][:images])
    bar = progress("calibration curve", len(chosen) * len(caches), "schedules")
    rows = []
    for name, numbers in chosen.items():
        calibration = expected_attention(
            network, labels[numbers], codes[numbers], config.calibration.batch
        )
        for cache in caches:
            limited = replace(cache, calibration=calibration)
            found = measure_likelihood(network, *test, limited, config.likelihood.batch)
            rows.append(
                {
                    "calibrated_on": name,
                    "policy": cache.policy_text,
                    "budget": cache.budget_text,
                    **named_interval("nll_delta", found.nll - found.nll_full),
                    "likelihood_images": len(found.nll),
                }
            )
            bar.update()
    bar.close()
    write_text(output, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
