"""CUDA graphs of a decode step: on a GPU, starting kernels one by one costs more than they do."""

from __future__ import annotations

import torch
from torch import Tensor

from fewlines.cache.buffer import BoundedCache
from fewlines.models.transformer import Transformer


class GraphedSteps:
    """The model's step, captured once for every signature of the buffers and replayed from then on.

    The first step of a signature runs as it is, which also warms it up; the second is captured.
    A bounded cache has a handful of signatures, a full one as many as it has blocks.
    """

    def __init__(self, model: Transformer, buffers: BoundedCache, rows: int) -> None:
        device = model.norm.weight.device
        self.model, self.buffers = model, buffers
        self.codes = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.warm: set[tuple[object, ...]] = set()
        self.graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes `(rows, 1)` at the buffers' position → logits `(rows, 1, V)`, valid until the next
        call."""
        self.codes.copy_(codes)
        self.position.fill_(self.buffers.position)
        signature = self.buffers.signature
        if signature not in self.warm:
            self.warm.add(signature)
            return self._run()
        if signature not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self._run()
            self.graphs[signature] = graph, logits
        graph, logits = self.graphs[signature]
        graph.replay()
        return logits

    def _run(self) -> Tensor:
        x = self.model.embed_codes(self.codes)
        logits: Tensor = self.model(x, self.position, self.buffers)
        return logits
