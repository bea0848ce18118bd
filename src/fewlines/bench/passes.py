"""What a pass of a network over one image takes, counted on weights that lie nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewlines.models.base import Model, ModelSettings, TokenSpec, get_family

Network = TypeVar("Network", bound=torch.nn.Module)

FLOAT = 4  # bytes
KEPT = 2.5  # floats kept for the gradients, for each that goes in and out of a matrix


@dataclass(frozen=True)
class Pass:
    """A pass forward over one image: its operations, and the bytes that a gradient would keep."""

    flops: float
    kept: float


def count_pass(network: Callable[[Tensor], Any], given: Tensor) -> Pass:
    """Count a pass of a network of which all lies on no device."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        network(given)
    return Pass(counter.get_total_flops(), kept)


def count_model(network: Model) -> Pass:
    """Count a pass of a model over the tokens of an image: two operations for each weight and
    token, where its family does not say more; what goes in and out of each matrix is kept."""
    n = network.spec.n_tokens
    flops = (network.count_training_flops() or 6.0 * n * count_weights(network)) / 3
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    sizes = sum(matrix.shape[0] + matrix.shape[1] for matrix in matrices)
    tables = network.spec.codes + network.spec.classes  # of which a row is read
    return Pass(flops, KEPT * FLOAT * n * max(sizes - tables, 0))


def make_network(settings: ModelSettings, spec: TokenSpec) -> Model:
    """Make the network that settings describe, its weights on no device."""
    return place_nowhere(get_family(settings.family), settings.make_shape(spec))


def place_nowhere(kind: Callable[[Any], Network], shape: Any) -> Network:
    """Make a network of a shape, its weights on no device."""
    with torch.device("meta"):
        return kind(shape)


def count_weights(network: torch.nn.Module) -> int:
    """Count a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
