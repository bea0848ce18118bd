"""Prompts of different length in one buffer: padding is never attended to, by any step."""

from __future__ import annotations

import pytest
import torch

import fewlines
from fewlines.attention import buffer
from fewlines.attention.buffer import BoundedCache
from fewlines.geometry import Geometry

GRID, PROMPT, DIM = (3, 3), 5, 8
FIRST = [0, 2, 4]  # of each row's prompt


def run(plan, rows: int, first: list[int], make, k, v, q, dtype) -> torch.Tensor:
    """What each row's queries got, `(B, N, Hq, D)`."""
    buffers = BoundedCache(plan, rows, DIM, dtype)
    buffers.steps = [[make(group) for group in layer] for layer in buffers.layers]
    prefix = plan.geometry.prefix
    buffers.pad(torch.tensor(first))
    buffers.write_prefix(0, k[:, :, :prefix], v[:, :, :prefix])
    out = []
    for step in range(plan.geometry.n_tokens):
        buffers.advance(step)
        at = slice(prefix + step, prefix + step + 1)
        out.append(buffers(0, q[:, :, at], k[:, :, at], v[:, :, at]))
    return torch.cat(out, 2)


CASES = [
    (engine, policy, merge, 1)
    for engine in ("torch_step", "compiled_step")
    for policy, merge in (("streaming", False), ("streaming", True), ("h2o", True), ("full", False))
]  # and the GPU's kernel, which is interpreted here, slowly
CASES += [("triton_step", "h2o", True, segments) for segments in (1, 2)]


@pytest.mark.parametrize(("engine", "policy", "merge", "segments"), CASES)
def test_each_row_is_as_if_it_were_alone(engine, policy, merge, segments, monkeypatch):
    if engine == "triton_step":
        kernels = pytest.importorskip("fewlines.attention.triton_kernels")
        monkeypatch.setattr(kernels, "segments", lambda *_: segments)
        monkeypatch.setattr(kernels, "block", lambda *_: 4)
    dtype = torch.float32 if engine == "compiled_step" else torch.float64
    cache = fewlines.cache(policy, **({} if policy == "full" else {"lines": 1, "merge": merge}))
    plan = cache.plan(Geometry(GRID, PROMPT, 1, 2))
    generator = torch.Generator().manual_seed(0)
    tokens = PROMPT + plan.geometry.n_tokens
    k, v = torch.randn(2, len(FIRST), 2, tokens, DIM, generator=generator, dtype=dtype)
    q = torch.randn(len(FIRST), 4, tokens, DIM, generator=generator, dtype=dtype)
    make = getattr(buffer, engine)
    together = run(plan, len(FIRST), FIRST, make, k, v, q, dtype)
    for row, first in enumerate(FIRST):
        one = [x[row : row + 1, :, first:] for x in (k, v, q)]
        short = cache.plan(Geometry(GRID, PROMPT - first, 1, 2))
        alone = run(short, 1, [0], make, *one, dtype)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-5)
