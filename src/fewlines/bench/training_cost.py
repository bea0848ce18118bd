"""What a step of training costs with a small cache in the loop: attention of `O(N · C)` instead of
`O(N²)`. Steps of a grid take turns, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.bench.cost import name_ratios
from fewlines.cache.spec import Cache, make_cache
from fewlines.config.settings import TrainingCostSettings
from fewlines.models.base import Model, ModelSettings, TokenSpec
from fewlines.progress import progress
from fewlines.training.loop import make_generator, take_step
from fewlines.training.model import ModelObjective, build_model

CODES, CLASSES, SEED = 256, 10, 0


def measure_training(
    family: type[Model], model: ModelSettings, settings: TrainingCostSettings
) -> list[dict[str, Any]]:
    """Measure a step on each grid under each cache: one dict of `seconds_per_step` of `images`,
    forward, backward and optimisers, the median; and the median and quartiles of `speedup` against
    the full cache."""
    caches = [make_cache("full"), *(each.build() for each in settings.caches)]
    steps = len(settings.grids) * len(caches) * (settings.repeats + 1)
    bar = progress("training cost", steps, "steps")
    rows: list[dict[str, Any]] = []
    for side in settings.grids:
        objectives = [
            _make_objective(family, model, side, settings.tokens, each) for each in caches
        ]
        seconds: list[list[float]] = [[] for _ in objectives]
        for repeat in range(settings.repeats + 1):
            for objective, taken in zip(objectives, seconds, strict=True):
                taken.append(machine.take_seconds(partial(take_step, objective, repeat)))
                bar.update()
        warm = [taken[1:] for taken in seconds]
        for each, objective, taken in zip(caches, objectives, warm, strict=True):
            rows.append(
                {
                    "grid": f"{side}x{side}",
                    "n_tokens": side * side,
                    "images": objective.settings.batch,
                    "policy": each.policy_text,
                    "budget": each.budget_text,
                    "seconds_per_step": float(np.median(taken)),
                    **name_ratios("speedup", warm[0], taken),
                    "repeats": settings.repeats,
                    "processor": machine.processor(),
                    "torch": torch.__version__,
                }
            )
    bar.close()
    return rows


def _make_objective(
    family: type[Model], model: ModelSettings, side: int, tokens: int, limit: Cache
) -> ModelObjective:
    shape = model.make_shape(TokenSpec((side, side), CODES, CLASSES))
    network = build_model(family, shape, SEED).to(machine.device())
    images = max(1, tokens // (side * side))
    settings = model.model_copy(update={"batch": images})
    generator = make_generator(SEED, 1)
    codes = torch.randint(CODES, (images, side * side), generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    memories = [network.limit(limit)]
    return ModelObjective(settings, network, labels, codes, SEED, memories=memories)
