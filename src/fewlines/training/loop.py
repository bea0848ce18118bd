"""The one training loop: counted steps, a checkpoint now and then, the same end after a restart."""

from __future__ import annotations

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.files import digest, parse, read_json, read_tensors, write_json, write_tensors
from fewlines.progress import progress
from fewlines.training import parallel
from fewlines.training.parallel import Backward, Share

WHOLE = Share()  # of a batch


class Objective(ABC):
    """What is trained: a network, its optimisers, its loss. Its randomness depends on the seed
    and the step alone, so that a resumed run takes the steps that the first would have taken."""

    network: nn.Module
    optimizers: list[torch.optim.Optimizer]
    steps: int
    batch: int
    warmup: int
    seed: int

    @abstractmethod
    def compute_loss(self, step: int, share: Share = WHOLE) -> Tensor:
        """Compute the mean loss of a share of a step's batch, ready for backward."""

    def after_step(self, step: int) -> None:  # noqa: B027
        """Do upkeep that is not a gradient, such as reviving dead codes."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """Say, JSON-like, whatever a checkpoint must share with this run to be continued by it:
        what is learned from, how, and with what randomness. The loop adds the weights it begins
        with."""


def draw_rows(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Draw the rows `(batch,)` of a step: epoch after epoch, each in a random order of its own."""
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    orders = [_order(count, seed, epoch) for epoch in epochs]
    offset = epochs[0] * count
    return torch.from_numpy(np.concatenate(orders)[first - offset : last - offset])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def make_generator(seed: int, step: int) -> torch.Generator:
    """Make the randomness of one step."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def scale_rate(step: int, steps: int, warmup: int) -> float:
    """Scale the peak rate of a step: linear warm-up, linear decay to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps)


def train(
    objective: Objective,
    name: str,
    checkpoints: Path,
    checkpoint_seconds: float,
    accumulate: int = 1,
) -> float:
    """Take the remaining steps, in every process of the training.

    Checkpoints are folders `step-…`, weights and optimiser state apart, each complete or absent; a
    killed run continues from the last one, on as many processes or on others.

    Args:
        objective: what is trained.
        name: shown with the progress.
        checkpoints: their folder.
        checkpoint_seconds: time between two.
        accumulate: parts that a process computes its share of a batch in.

    Returns:
        The mean seconds of a step, of an earlier run where none was left.

    Raises:
        FewlinesError: the loss, or at a checkpoint a weight, is not finite. Nothing is saved then,
            and a run at lower rates begins anew. Or the batch cannot be divided.
    """
    backward = make_backward(objective, accumulate)
    identity = _identity(objective)
    peaks = [
        [group["lr"] for group in optimizer.param_groups] for optimizer in objective.optimizers
    ]
    done = _restore(objective, checkpoints, identity)
    seconds = _read_seconds(checkpoints) if done else 0.0
    bar = progress(name, objective.steps, "steps", done, shown=parallel.is_first())
    started = saved = time.perf_counter()
    objective.network.train()
    for step in range(done, objective.steps):
        share = scale_rate(step, objective.steps, objective.warmup)
        for optimizer, rates in zip(objective.optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = take_step(objective, step, backward)
        objective.after_step(step)
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{_check_loss(loss, name, step):.3f}", refresh=False)
        if parallel.any_of(time.perf_counter() - saved > checkpoint_seconds):
            _check_loss(loss, name, step)
            seconds = (time.perf_counter() - started) / (step + 1 - done)
            _save(objective, name, checkpoints, step + 1, identity, seconds)
            saved = time.perf_counter()
    bar.close()
    if done < objective.steps:
        seconds = (time.perf_counter() - started) / (objective.steps - done)
        _check_loss(loss, name, objective.steps - 1)
        _save(objective, name, checkpoints, objective.steps, identity, seconds)
    objective.network.eval()
    return seconds


def _check_loss(loss: Tensor, name: str, step: int) -> float:
    value = loss.item()
    if not np.isfinite(value):
        raise FewlinesError(
            f"{name}: the loss is {value} at step {step}; lower its rates and run again"
        )
    return value


def _check_finite(weights: Mapping[str, Tensor], name: str, step: int) -> None:
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise FewlinesError(
                f"{name}: {key} is not finite after step {step}; lower its rates and run again"
            )


def checkpoints_of(output: Path) -> Path:
    """Name the folder of checkpoints of a training that writes `output`."""
    return output.with_suffix(".checkpoints")


def make_backward(objective: Objective, accumulate: int = 1) -> Backward:
    """Make what computes an objective's gradients; `accumulate` as of `train`."""
    return Backward(objective.network, objective.compute_loss, objective.batch, accumulate)


def take_step(objective: Objective, step: int, backward: Backward | None = None) -> Tensor:
    """Take one step at the rates that the optimisers have; returns the loss of the whole batch."""
    backward = backward or make_backward(objective)
    for optimizer in objective.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = backward(step)
    for optimizer in objective.optimizers:
        optimizer.step()
    return loss


def _identity(objective: Objective) -> list[Any]:
    """What tells one run from another, before its first step; whole in the first process
    alone."""
    parameters = objective.network.named_parameters()
    trained = [name for name, parameter in parameters if parameter.requires_grad]
    weights = parallel.read_weights(objective.network)
    return [*objective.fingerprint(), digest(weights.values()), trained]


def _save(
    objective: Objective,
    name: str,
    checkpoints: Path,
    step: int,
    identity: list[Any],
    seconds: float,
) -> None:
    weights = parallel.read_weights(objective.network)
    states = parallel.read_states(objective.network, objective.optimizers)
    _check_finite(weights, name, step - 1)
    if not parallel.is_first():
        return
    final = checkpoints / f"step-{step:07d}"
    partial = checkpoints / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / "weights.safetensors", weights)
    torch.save(states, partial / "optimizers.pt")
    write_json(partial / "task.json", identity)
    write_json(partial / "seconds.json", seconds)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for older in sorted(checkpoints.glob("step-*"))[:-1]:
        shutil.rmtree(older)


def _read_seconds(checkpoints: Path) -> float:
    """Read the seconds of a step from the last checkpoint; 0 of one that does not say."""
    last = max(checkpoints.glob("step-*")) / "seconds.json"
    return float(read_json(last)) if last.exists() else 0.0


def _restore(objective: Objective, checkpoints: Path, identity: list[Any]) -> int:
    """Continue from the last checkpoint, if it is of this very run; returns the steps done."""
    saved = sorted(checkpoints.glob("step-*"))
    if not saved:
        return 0
    last = saved[-1]
    try:
        task = read_json(last / "task.json")
        weights, _ = read_tensors(last / "weights.safetensors")
        load = partial(torch.load, map_location="cpu", weights_only=True)
        states = parse(last / "optimizers.pt", load, "a whole file")
        if not isinstance(states, dict):
            raise FewlinesError("its optimisers' states have no names")
    except (FewlinesError, OSError) as error:
        print(f"{last} is damaged ({error}); training begins anew", file=sys.stderr)
        task = None
    parallel.wait()  # until all have read it
    # The first process alone has all weights to know a run by.
    goes_on = parallel.agree(task == identity) and not parallel.any_of(task is None)
    if not goes_on:  # of other settings, data or weights, or damaged: this run replaces it
        if parallel.is_first():
            shutil.rmtree(checkpoints)
        return 0
    parallel.load(objective.network, objective.optimizers, weights, states)
    return int(last.name.removeprefix("step-"))
