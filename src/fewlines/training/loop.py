"""The one training loop: counted steps, a checkpoint now and then, the same end after a restart."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.files import digest, read_json, read_tensors, write_json, write_tensors
from fewlines.progress import progress


class Task(ABC):
    """What is trained: a network, its optimisers, its loss. Its randomness depends on the seed
    and the step alone, so that a resumed run takes the steps that the first would have taken."""

    network: nn.Module
    optimizers: list[torch.optim.Optimizer]
    steps: int
    warmup: int
    seed: int

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of one step, ready for backward."""

    def after_step(self, step: int) -> None:  # noqa: B027
        """Upkeep that is not a gradient, such as reviving dead codes."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON-like: whatever a checkpoint must share with this run to be continued by it: what is
        learned from, how, and with what randomness. The loop adds the weights it begins with."""


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The rows `(batch,)` of a step: epoch after epoch, each in a random order of its own."""
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs]
    offset = epochs[0] * count
    return torch.from_numpy(np.concatenate(orders)[first - offset : last - offset])


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: linear warm-up, linear decay to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps)


def train(task: Task, name: str, checkpoints: Path, checkpoint_seconds: float) -> float:
    """Take the remaining steps; returns the mean seconds of a step, 0 if none was left.

    Checkpoints are folders `step-…` under `checkpoints`, weights and optimiser state apart, each
    complete or absent; a killed run continues from the last one.
    """
    identity = _identity(task)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in task.optimizers]
    done = _restore(task, checkpoints, identity)
    bar = progress(name, task.steps, "steps", done)
    started = saved = time.perf_counter()
    task.network.train()
    for step in range(done, task.steps):
        share = learning_rate(step, task.steps, task.warmup)
        for optimizer, rates in zip(task.optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = take_step(task, step)
        task.after_step(step)
        bar.update()
        if step % 20 == 0:
            value = loss.item()
            if not np.isfinite(value):
                raise FewlinesError(f"{name}: the loss is {value} at step {step}; lower the rates")
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        if time.perf_counter() - saved > checkpoint_seconds:
            _save(task, checkpoints, step + 1, identity)
            saved = time.perf_counter()
    bar.close()
    seconds = (time.perf_counter() - started) / (task.steps - done) if done < task.steps else 0.0
    if done < task.steps:
        _save(task, checkpoints, task.steps, identity)
    task.network.eval()
    return seconds


def take_step(task: Task, step: int) -> Tensor:
    """Forward, backward and the optimisers, at the rates they have; returns the loss."""
    for optimizer in task.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = task.loss(step)
    loss.backward()
    for optimizer in task.optimizers:
        optimizer.step()
    return loss


def _identity(task: Task) -> list[Any]:
    """Of a run, before its first step."""
    parameters = task.network.named_parameters()
    trained = [name for name, parameter in parameters if parameter.requires_grad]
    return [*task.fingerprint(), digest(task.network.state_dict().values()), trained]


def _save(task: Task, checkpoints: Path, step: int, identity: list[Any]) -> None:
    final = checkpoints / f"step-{step:07d}"
    partial = checkpoints / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / "weights.safetensors", task.network.state_dict())
    optimizers = [optimizer.state_dict() for optimizer in task.optimizers]
    torch.save(optimizers, partial / "optimizers.pt")
    write_json(partial / "task.json", identity)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for older in sorted(checkpoints.glob("step-*"))[:-1]:
        shutil.rmtree(older)


def _restore(task: Task, checkpoints: Path, identity: list[Any]) -> int:
    """Continue from the last checkpoint, if it is of this very run; returns the steps done."""
    saved = sorted(checkpoints.glob("step-*"))
    if not saved:
        return 0
    last = saved[-1]
    if read_json(last / "task.json") != identity:
        shutil.rmtree(checkpoints)  # of other settings, data or weights: this run replaces it
        return 0
    weights, _ = read_tensors(last / "weights.safetensors")
    task.network.load_state_dict(weights)
    states = torch.load(last / "optimizers.pt", map_location="cpu", weights_only=True)
    for optimizer, state in zip(task.optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return int(last.name.removeprefix("step-"))
