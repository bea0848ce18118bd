"""A transformer made ready for decoding: its weights cast and packed once, not at every step."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines.models.transformer import Transformer


class PackedLinear(nn.Module):
    """A linear layer without bias that multiplies in `dtype` and answers in its input's.

    On the CPU oneDNN lays the weights out for products of `rows` rows: at a few rows 1.3 to 3
    times faster than `F.linear`, which does so at every call (docs/engine.md). A single float32
    row is the exception: MKL's matrix-vector product is the faster one.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.packed &= dtype == torch.bfloat16 or (dtype == torch.float32 and rows > 1)
        weight = weight.detach().to(dtype)
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        )

    def forward(self, x: Tensor) -> Tensor:
        given = x.to(self.dtype)
        y: Tensor = (
            torch.ops.mkldnn._linear_pointwise(given, self.weight, None, "none", [], "")
            if self.packed
            else F.linear(given, self.weight)
        )
        return y.to(x.dtype)


def prepare(
    model: Transformer, dtype: torch.dtype, rows: int, *, consume: bool = False
) -> Transformer:
    """The same model for decoding `rows` rows at once, with linear layers that multiply in
    `dtype`; everything between them stays as it is.

    Args:
        consume: take the weights out of `model` as they are packed, so that there is never more
            than one copy of them; the given model is then of no more use.
    """

    def ready(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            linear = PackedLinear(module.weight, dtype, rows)
            if consume:
                module.weight.data = torch.empty(0)
            return linear
        twin = copy.copy(module)
        twin._modules = {name: ready(child) for name, child in module.named_children()}
        return twin

    twin = ready(model)
    assert isinstance(twin, Transformer)
    return twin
