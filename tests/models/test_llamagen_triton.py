"""What a GPU runs between the products, interpreted, where there is none; else see `test_cuda`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_transformer
from fewlines.attention.attend import attend_causally
from fewlines.models.llamagen.engine import (
    FusedBlock,
    PackedAttention,
    PackedFeedForward,
    PackedLinear,
    swiglu_plain,
)
from fewlines.models.llamagen.model import Attention, rotate

kernels = pytest.importorskip("fewlines.models.llamagen.triton_kernels")
pytestmark = [
    pytest.mark.no_cover,  # a tracer doubles the time of what is interpreted
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda runs it on the GPU"),
]


@pytest.mark.parametrize(("heads", "turned", "D", "T"), [(3, 2, 8, 1), (40, 27, 48, 3)])
def test_the_first_heads_are_turned_in_place(heads, turned, D, T):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, T, heads, D, generator=generator)
    rotation = torch.randn(T, D // 2, 2, generator=generator)
    expected = torch.cat([rotate(qkv[:, :, :turned], rotation), qkv[:, :, turned:]], dim=2)
    kernels.rotate(qkv, turned, rotation)
    torch.testing.assert_close(qkv, expected)


@pytest.mark.parametrize("hidden", [96, 1500])
def test_swiglu_is_that_of_torch(hidden):
    both = torch.randn(2, 3, 2 * hidden, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(kernels.swiglu(both), swiglu_plain(both))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_fused_block_computes_what_a_block_does(kv_heads):
    model = tiny_transformer(torch.float64, kv_heads, layers=1)
    block, rotation = model.layers[0], model.rotations[1:4]

    def pack(weight):
        return PackedLinear(weight, torch.float64, 2)

    def ready(module: nn.Module) -> nn.Module:
        if isinstance(module, Attention):
            return PackedAttention(module, pack, kernels.rotate)
        if isinstance(module, nn.RMSNorm):
            return module
        return PackedFeedForward(module, pack, kernels.swiglu)

    x = torch.randn(2, 3, model.shape.dim, dtype=torch.float64)
    expected = block(0, x, rotation, attend_causally)
    computed = FusedBlock(block, ready)(0, x.clone(), rotation, attend_causally)
    torch.testing.assert_close(computed, expected)
