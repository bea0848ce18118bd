"""LoRA (arXiv 2106.09685): an update of low rank beside each matrix, trained in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """A matrix `(out, in)` and the update `up @ down`, which begins as zeros."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the update to the matrix."""
        return weight + self.up @ self.down


def add_low_rank(network: nn.Module, part: str, rank: int, generator: torch.Generator) -> None:
    """Give an update to the linear layers whose names have `part`; all else stands still."""
    network.requires_grad_(False)
    linear = {n: module for n, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        if part in f".{name}":
            update = LowRank(module.weight, rank, generator)
            parametrize.register_parametrization(module, "weight", update)


def merge_low_rank(network: nn.Module) -> None:
    """Add each update to its matrix: plain weights again."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
