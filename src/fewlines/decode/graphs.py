"""CUDA graphs of a decode step: on a GPU, starting kernels one by one costs more than they do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewlines.models.base import State

Made = TypeVar("Made")


def capture(run: Callable[[], Made], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Capture the graph of what has run before, and what it makes. The collector is kept still
    meanwhile: what it frees of CUDA in the middle of a capture breaks it."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            made = run()
    finally:
        if collects:
            gc.enable()
    return graph, made


class GraphedSteps:
    """A step, drawing included, captured once for every signature of the state and replayed from
    then on.

    The first step of a signature runs as it is, which also warms it up; the second is captured.
    By the Triton kernel there are one or a handful of signatures; by torch's operators a full cache
    has as many as it has blocks.

    """

    def __init__(
        self,
        advance: Callable[[Tensor, Tensor, Tensor], Tensor],
        state: State,
        images: int,
        device: torch.device,
    ) -> None:
        """Make the memory that graphs read from.

        Args:
            advance: codes `(B,)`, the position `(1,)` and noise `(B,)` → the next codes `(B,)`.
            state: of the batch.
            images: of the batch.
            device: a GPU.
        """
        self.advance, self.state = advance, state
        self.codes = torch.zeros(images, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.noise = torch.zeros(images, dtype=torch.float64, device=device)
        self.warm: set[tuple[object, ...]] = set()
        self.graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, codes: Tensor, noise: Tensor) -> Tensor:
        """Draw from codes `(B,)` at the state's position the next, valid until the next call."""
        self.codes.copy_(codes)
        self.noise.copy_(noise)
        self.position.fill_(self.state.position)
        signature = self.state.signature
        if signature not in self.warm:
            self.warm.add(signature)
            return self._run()
        if signature not in self.graphs:
            self.graphs[signature] = capture(self._run, self.pool)
        graph, drawn = self.graphs[signature]
        graph.replay()
        return drawn

    def _run(self) -> Tensor:
        return self.advance(self.codes, self.position, self.noise)
