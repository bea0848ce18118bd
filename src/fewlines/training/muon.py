"""Muon (Jordan et al. 2024; arXiv 2502.16982). A convolution is a matrix of what a place of its
output reads. Of a matrix that is divided over processes, each gathers the whole update, as in
2502.16982, and keeps its part.

torch.optim.Muon orthogonalises in bfloat16 always, which processors without bf16 instructions
multiply hundreds of times slower than float32; here it is done in the precision of the training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton–Schulz, Jordan et al.


def orthogonalise(update: Tensor, precision: torch.dtype, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to `(m, n)`, roughly: singular values in 0.7 … 1.2."""
    a, b, c = COEFFICIENTS
    update = update.float()
    x: Tensor = (update / (update.norm() + 1e-7)).to(precision)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov, then orthogonalisation, for matrices and convolutions.

    Args:
        params: parameters `(m, n, …)`, or groups of them; a group's `split` lists the row counts of
            the matrices that one parameter fuses (queries, keys, values).
        lr: step size; each update is scaled by `√max(1, rows/columns)`.
        momentum: of the mean of gradients.
        precision: of the products that orthogonalise.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "split": None})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"].lerp_(parameter.grad, 1 - momentum)
                direction = parameter.grad.lerp(velocity, momentum)
                rows = group["split"] or [len(parameter)]
                if isinstance(parameter, DTensor):
                    update = _make_update(direction.full_tensor(), rows, self.precision)
                    place = (parameter.device_mesh, parameter.placements)
                    parameter.add_(distribute_tensor(update, *place), alpha=-group["lr"])
                else:  # rounded once, as all that is published was
                    for part, of in zip(direction.split(rows), parameter.split(rows), strict=True):
                        update = orthogonalise(part.flatten(1), self.precision).view_as(part)
                        of.add_(update, alpha=-group["lr"] * _scale(part))


def _scale(part: Tensor) -> float:
    """The factor of the update of a matrix."""
    return float(max(1.0, part.shape[0] / part[0].numel()) ** 0.5)


def _make_update(direction: Tensor, rows: list[int], precision: torch.dtype) -> Tensor:
    """Each of the matrices of so many rows by itself, scaled."""
    return torch.cat(
        [
            orthogonalise(part.flatten(1), precision).view_as(part) * _scale(part)
            for part in direction.split(rows)
        ]
    )
