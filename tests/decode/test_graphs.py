"""CUDA graphs without CUDA: a graph is played by a run whose host-side numbers are frozen."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fewlines
from conftest import GRID
from fewlines.decode.graphs import GraphedSteps
from fewlines.decode.loop import Decoder, decode
from fewlines.decode.sampler import draw_noise

N = GRID[0] * GRID[1]
HOST = ("shortest", "longest", "evicting", "evicted", "seen")
CACHES = [
    fewlines.cache("full"),
    fewlines.cache("streaming", lines=2, sinks=1),
    fewlines.cache("random", tokens=7, merge=True),
    *(fewlines.cache(policy, lines=2, merge=True) for policy in ("h2o", "tova", "snapkv")),
    fewlines.cache("line_ar", lines=2, anchor=1, pool="query"),
]


class FrozenGraph:
    """What a CUDA graph keeps: whatever the host knew when it was captured."""

    def capture(self, steps: GraphedSteps) -> None:
        self.steps = steps
        self.groups = [group for layer in steps.state.buffers.layers for group in layer]
        self.host = [{name: getattr(g.slots, name) for name in HOST} for g in self.groups]

    def replay(self) -> None:
        now = [{name: getattr(g.slots, name) for name in HOST} for g in self.groups]
        self._set(self.host)
        _, drawn = self.steps.graphs[self.steps.state.signature]
        drawn.copy_(self.steps._run())
        self._set(now)

    def _set(self, states) -> None:
        for group, state in zip(self.groups, states, strict=True):
            for name, value in state.items():
                setattr(group.slots, name, value)


@pytest.fixture
def fake_cuda(monkeypatch):
    @contextlib.contextmanager
    def capturing(graph, pool):
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FrozenGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)


@pytest.mark.parametrize(
    ("cache", "engine", "most"),
    [*((cache, "lean", N / 2) for cache in CACHES), (CACHES[0], "stock-graph", 1)],
    ids=lambda value: getattr(value, "slug", value),
)
def test_replayed_steps_draw_the_same_tokens(model64, cache, engine, most, fake_cuda, monkeypatch):
    labels, noise = torch.tensor([0, 1, 2]), draw_noise(3, range(3), N)
    expected = decode(model64, labels, noise, cache)
    made, run = [], GraphedSteps._run

    def run_or_capture(steps):
        graph = next((g for g in made if not hasattr(g, "steps")), None)
        if graph is None:
            return run(steps)
        graph.capture(steps)  # a capture computes nothing
        return torch.zeros(3, dtype=torch.long)

    monkeypatch.setattr(GraphedSteps, "_run", run_or_capture)
    monkeypatch.setattr(FrozenGraph, "__init__", lambda graph: made.append(graph))

    decoder = Decoder(model64, 3, cache, engine=engine)
    decoder.graphs = GraphedSteps(decoder.draw_next, decoder.state, 3, labels.device)
    with torch.inference_mode():
        codes = [decoder.start(labels, noise[:, 0])]
        for step in range(N - 1):
            codes.append(decoder.step(step, codes[-1], noise[:, step + 1]).clone())
    assert torch.equal(torch.stack(codes, 1), expected)
    assert made
    assert len(decoder.graphs.warm) <= most
