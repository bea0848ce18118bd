"""Small trainings on as many processes as `torchrun` starts this file in: weights and losses of
each go to a folder. `test_parallel.py` compares."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fewlines
from fewlines.config.tokenizer import TokenizerSettings
from fewlines.files import write_json, write_tensors
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.settings import LlamaGenSettings
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.training import loop
from fewlines.training.loop import Objective, make_generator, train
from fewlines.training.model import ModelObjective
from fewlines.training.parallel import is_first, join, read_weights, spread, wait
from fewlines.training.tokenizer import TokenizerObjective

STEPS, HALF = 12, 5
RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (64, 1, 8, 8), generator=RANDOM, dtype=torch.uint8)
LABELS = torch.arange(64) % 4
CODES = torch.randint(7, (64, 12), generator=RANDOM)


def make_model(
    divided: bool = False, recompute: bool = False, compiled: bool = False, layers: int = 2
) -> Objective:
    """Of a transformer; one of two caches is in the loop of each step, and a teacher."""
    settings = LlamaGenSettings(dim=16, layers=layers, heads=2, steps=STEPS, batch=8, warmup=2)
    shape = TransformerShape(16, layers, 2, 1, codes=7, classes=4, grid=(3, 4), multiple_of=16)
    network, teacher = Transformer(shape), Transformer(shape)
    network.initialise(make_generator(3, 0))
    teacher.initialise(make_generator(4, 0))
    caches = [fewlines.cache("full"), fewlines.cache("streaming", tokens=4, sinks=1)]
    memories = [network.limit(cache) for cache in caches]
    how = {"divided": divided, "recompute": recompute, "compiled": compiled}
    spread(network, "teacher_forced", **how)
    given = (settings, network, LABELS, CODES, 3, torch.float32, memories, teacher, 0.5)
    return ModelObjective(*given)


def make_tokenizer() -> Objective:
    """Of a tokenizer that revives codes."""
    settings = TokenizerSettings(widths=(4, 8), codes=16, steps=45, batch=8)
    return TokenizerObjective(settings, IMAGES, seed=3)


TASKS: dict[str, tuple[Callable[[], Objective], int]] = {
    "model": (make_model, 1),
    "accumulated": (make_model, 2),
    "recomputed": (lambda: make_model(recompute=True), 1),
    "tokenizer": (make_tokenizer, 2),
}
# What one process cannot divide is compared with the whole.
DIVIDED = {
    "divided": (lambda: make_model(divided=True), 1),
    "divided, accumulated, recomputed": (lambda: make_model(divided=True, recompute=True), 2),
}


def run(
    task: Objective, accumulate: int, checkpoints: Path, stop: int | None = None
) -> list[float]:
    """Train, to step `stop` where there is one; returns the losses of this run."""
    losses: list[float] = []
    take_step = loop.take_step

    def watched(objective: Objective, step: int, *given: object) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        loss = take_step(objective, step, *given)
        losses.append(loss.item())
        return loss

    loop.take_step = watched
    try:
        train(task, "task", checkpoints, 1e-9 if stop else 60, accumulate)
    except KeyboardInterrupt:
        pass
    finally:
        loop.take_step = take_step
    return losses


@join()
def main(folder: Path) -> None:
    """All of them, and halves of two, whose checkpoints stay and are gone on from."""
    found = {}
    for name, (make, accumulate) in (TASKS | DIVIDED).items():
        task = make()
        found[name] = run(task, accumulate, folder / "checkpoints" / name)
        weights = read_weights(task.network)
        if is_first():
            write_tensors(folder / f"{name}.safetensors", weights)
    for name in ("model", "divided"):
        make, accumulate = (TASKS | DIVIDED)[name]
        run(make(), accumulate, folder / "halves" / name, HALF)
        if is_first():
            shutil.copytree(folder / "halves" / name, folder / "resumed" / name)
        wait()
        found[f"{name}, resumed"] = run(make(), accumulate, folder / "resumed" / name)
    if is_first():
        write_json(folder / "losses.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
