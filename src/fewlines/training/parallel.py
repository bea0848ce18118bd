"""Training on several processes, which `torchrun` starts: each computes its share of every batch.

Gradients are averaged by torch's DistributedDataParallel, or, where weights, gradients and
optimiser states are divided over the processes, by FSDP2. All randomness is drawn for the whole
batch in every process: the same batch gives the same steps, up to rounding, on any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fewlines import machine
from fewlines.errors import FewlinesError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
Network = TypeVar("Network", bound=nn.Module)
Agreed = TypeVar("Agreed")


@dataclass(frozen=True)
class Share:
    """Part `index` of the `count` equal parts of a batch."""

    index: int = 0
    count: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Give its rows of what has a row for each image of the batch."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]


@contextmanager
def join() -> Iterator[None]:
    """Join the processes that `torchrun` started beside this one, if it did, for a training."""
    if not dist.is_torchelastic_launched():
        yield
        return
    local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here and local >= here:
        raise FewlinesError(f"training.gpus: there are {here} on this machine; write as many")
    if here:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_processes() -> int:
    """Count the processes of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def divide(batch: int, accumulate: int) -> list[Share]:
    """Divide a batch: the shares of this process, one after another.

    Args:
        batch: images of a step.
        accumulate: shares of a process.

    Raises:
        FewlinesError: the batch has no such equal parts.
    """
    count = count_processes() * accumulate
    if batch % count:
        raise FewlinesError(
            f"training: a batch of {batch} has no {count} equal parts, {accumulate} for each of "
            f"{count_processes()} processes; write a batch that {count} divides"
        )
    first = (dist.get_rank() if dist.is_initialized() else 0) * accumulate
    return [Share(first + part, count) for part in range(accumulate)]


def spread(
    network: Network, forward: str, *, divided: bool, recompute: bool, compiled: bool = False
) -> Network:
    """Spread a network over the processes and its layers over time, before it is trained.

    Args:
        network: with a list of `layers`.
        forward: the method that is called to compute with it.
        divided: its weights, gradients and optimiser states are divided over the processes (FSDP2).
        recompute: what lies between two layers alone is kept for the gradients; the rest is
            computed again (activation checkpointing).
        compiled: layers are compiled by torch, one graph for all.

    Raises:
        FewlinesError: it has no such list.
    """
    if not (divided or recompute or compiled):
        return network
    layers = getattr(network, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise FewlinesError(
            f"training: a {type(network).__name__} has no list of layers; leave out shard, "
            "recompute and compile"
        )
    for layer in layers:
        if type(layer).forward is nn.Module.forward:
            raise FewlinesError(
                f"training: the layers of a {type(network).__name__} are not computed one after "
                "another; leave out shard, recompute and compile"
            )
        if compiled:
            layer.forward = torch.compile(layer.forward)
        if recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if divided:
            fully_shard(layer)
    if divided:
        fully_shard(network)
        register_fsdp_forward_method(network, forward)
    return network


class Averaged(nn.Module):
    """A loss as a module, whose gradients torch averages over the processes."""

    def __init__(self, network: nn.Module, compute: Any) -> None:
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, step: int, share: Share) -> Tensor:
        """Compute the loss of a share of a step's batch."""
        loss: Tensor = self.compute(step, share)
        return loss


class Backward:
    """Computes the gradients of a step, share by share."""

    def __init__(self, network: nn.Module, compute: Any, batch: int, accumulate: int = 1) -> None:
        """Prepare.

        Args:
            network: that is trained.
            compute: the loss of a step and a share of its batch.
            batch: images of a step.
            accumulate: shares of a process.
        """
        self.shares = divide(batch, accumulate)
        self.network, self.loss = network, compute
        if count_processes() > 1 and not isinstance(network, FSDPModule):
            averaged = Averaged(network, compute)
            self.loss = DistributedDataParallel(averaged, broadcast_buffers=False)

    def __call__(self, step: int) -> Tensor:
        """Leave the mean gradient of the whole batch in the parameters; returns its loss."""
        losses = []
        for number, share in enumerate(self.shares):
            last = number == len(self.shares) - 1
            with self._wait(last):
                loss = self.loss(step, share) / len(self.shares)
                loss.backward()
            losses.append(loss.detach())
        return average(torch.stack(losses).sum())  # still on its device: nothing waits for it

    def _wait(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged once, after the last share."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        elif isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return nullcontext()


def average(value: Tensor) -> Tensor:
    """Average a number over the processes."""
    if count_processes() == 1:
        return value
    value = value.to(machine.device())
    dist.all_reduce(value)
    return value / count_processes()


def gather(rows: Tensor) -> Tensor:
    """Gather rows `(n, …)` of all processes, as many of each, in their order."""
    if count_processes() == 1:
        return rows
    here = rows.to(machine.device()).contiguous()
    parts = [torch.empty_like(here) for _ in range(count_processes())]
    dist.all_gather(parts, here)
    return torch.cat(parts).to(rows.device)


def read_weights(network: nn.Module) -> dict[str, Any]:
    """Read all weights by their names, wherever they lie: every process has to ask."""
    return get_model_state_dict(network, options=WHOLE)


def read_states(network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Read the states of optimisers by the names of what they train: every process has to ask."""
    return get_optimizer_state_dict(network, optimizers, options=WHOLE)


def load(
    network: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    weights: dict[str, Any],
    states: dict[str, Any],
) -> None:
    """Load what `read_weights` and `read_states` read, on any number of processes."""
    set_model_state_dict(network, weights, options=WHOLE)
    set_optimizer_state_dict(network, optimizers, states, options=WHOLE)


def any_of(here: bool) -> bool:
    """Whether it holds in any of the processes, whose clocks differ."""
    return bool(average(torch.tensor(float(here))) > 0)


def agree(here: Agreed) -> Agreed:
    """Go by what the first process says, in all."""
    if count_processes() == 1:
        return here
    said = [here]
    dist.broadcast_object_list(said, device=machine.device())
    return said[0]


def wait() -> None:
    """Wait until all processes are here."""
    if count_processes() > 1:
        dist.barrier()
