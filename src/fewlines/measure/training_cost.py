"""What a step of training costs with a small cache in the loop: attention of `O(N · C)` instead of
`O(N²)`. Steps of a grid take turns, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.cache.placement import Cache, cache
from fewlines.config import ModelSettings, TrainingCostSettings
from fewlines.measure.cost import ratio_interval
from fewlines.progress import progress
from fewlines.training.loop import step_generator, take_step
from fewlines.training.transformer import TransformerTask, attend_in_training, new_transformer

CODES, CLASSES, SEED = 256, 10, 0


def training_cost(model: ModelSettings, settings: TrainingCostSettings) -> list[dict[str, Any]]:
    """One dict per grid and cache: `seconds_per_step` of `images`, forward, backward and
    optimisers, the median; and the median and quartiles of `speedup` against the full cache."""
    caches = [cache("full"), *(each.build() for each in settings.caches)]
    steps = len(settings.grids) * len(caches) * (settings.repeats + 1)
    bar = progress("training cost", steps, "steps")
    rows: list[dict[str, Any]] = []
    for side in settings.grids:
        tasks = [_task(model, side, settings.tokens, each) for each in caches]
        seconds: list[list[float]] = [[] for _ in tasks]
        for repeat in range(settings.repeats + 1):
            for task, taken in zip(tasks, seconds, strict=True):
                taken.append(_timed(task, repeat))
                bar.update()
        warm = [taken[1:] for taken in seconds]
        for each, task, taken in zip(caches, tasks, warm, strict=True):
            median, low, high = ratio_interval(warm[0], taken)
            rows.append(
                {
                    "grid": f"{side}x{side}",
                    "n_tokens": side * side,
                    "images": task.settings.batch,
                    "policy": each.policy_text,
                    "budget": each.budget_text,
                    "seconds_per_step": float(np.median(taken)),
                    "speedup": median,
                    "speedup_low": low,
                    "speedup_high": high,
                    "repeats": settings.repeats,
                    "processor": machine.processor(),
                    "torch": torch.__version__,
                }
            )
    bar.close()
    return rows


def _task(model: ModelSettings, side: int, tokens: int, limit: Cache) -> TransformerTask:
    shape = model.on((side, side), CODES, CLASSES)
    network = new_transformer(shape, SEED).to(machine.device())
    images = max(1, tokens // (side * side))
    settings = model.model_copy(update={"batch": images})
    generator = step_generator(SEED, 1)
    codes = torch.randint(CODES, (images, side * side), generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    attend = attend_in_training(limit.place(shape.geometry), machine.device())
    return TransformerTask(settings, network, labels, codes, SEED, attends=[attend])


def _timed(task: TransformerTask, step: int) -> float:
    machine.synchronise()
    start = time.perf_counter()
    take_step(task, step)
    machine.synchronise()
    return time.perf_counter() - start
