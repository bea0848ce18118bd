"""What a decode step does, operator by operator, and what that costs on a device.

Of a decode step only three things count: the linear layers (arithmetic, or reading the weights),
reading keys and values, and the many small operators in between, whose cost is starting them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fewlines.cache.spec import Cache
from fewlines.devices import Device
from fewlines.models.base import CHUNK
from fewlines.models.llamagen.shape import TransformerShape

SMALL_OPERATORS = 24  # of a layer, between the products: norms, rotation, SwiGLU, residuals
FUSED_OPERATORS = 5  # on a GPU
SAMPLING_PASSES = 6  # over the logits
FLOAT = 4  # bytes of an activation


def list_linears(shape: TransformerShape) -> list[tuple[int, int]]:
    """List `(out, in)` of every linear layer of a step."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    block = [
        (qkv, shape.dim),
        (shape.dim, shape.dim),
        (shape.hidden, shape.dim),
        (shape.hidden, shape.dim),
        (shape.dim, shape.hidden),
    ]
    return block * shape.layers + [(shape.codes, shape.dim)]


@dataclass(frozen=True)
class Decode:
    """A decode whose cost is asked for.

    Attributes:
        shape: of the model.
        rows: of the batch; under guidance twice the images.
        cache: what stays resident.
        precision: of the products.
        storage: of keys and values.
        whole: attention reads the whole buffer at every step, as a stock cache does.
    """

    shape: TransformerShape
    rows: int
    cache: Cache
    precision: torch.dtype
    storage: torch.dtype
    whole: bool = False

    @property
    def kv_bytes(self) -> int:
        """Held at the end of the image, exact."""
        plan = self.cache.plan(self.shape.geometry)
        return self.rows * plan.count_bytes(self.shape.head_dim, self.storage)

    @property
    def policy_bytes(self) -> int:
        """Bytes of a scoring policy's bookkeeping: positions, what it adds up or remembers, and
        places of tokens to come."""
        plan = self.cache.plan(self.shape.geometry)
        policy = plan.scoring
        if policy is None:
            return 0
        floats = {None: 0, "line_query": 0, "attention": policy.window}.get(policy.needs, 1)
        geometry, capacity = self.shape.geometry, plan.capacity
        ahead = max(policy.interval(geometry, int(each)) for each in np.unique(capacity))
        entries = plan.count_entries() * (8 + FLOAT * floats) + capacity.size * ahead * 8
        return int(entries * self.rows)

    def count_step_bytes(self, step: int) -> int:
        """Count the bytes of keys and values read when image token `step` goes in."""
        plan = self.cache.plan(self.shape.geometry)
        seen = plan.count_entries() if self.whole else self._written(step)
        return seen * 2 * self.shape.head_dim * self.storage.itemsize * self.rows

    def average_bytes(self) -> float:
        """Average `count_step_bytes` over the image's steps."""
        steps = np.linspace(0, self.shape.geometry.n_tokens - 2, 65).astype(int)
        reads = [self.count_step_bytes(int(step)) for step in np.unique(steps)]
        return float(np.trapezoid(reads, np.unique(steps)) / (steps[-1] - steps[0]))

    def _written(self, step: int) -> int:
        geometry = self.shape.geometry
        capacity = self.cache.plan(geometry).entries
        return int(np.minimum(capacity, step + 1).sum()) + capacity.size * geometry.prefix

    def predict_linear(self, device: Device) -> float:
        """Predict the seconds of the linear layers of a step."""
        return sum(
            max(
                2 * self.rows * out * into / device.flops,
                out * into * self.precision.itemsize / device.bandwidth,
            )
            for out, into in list_linears(self.shape)
        )

    def predict_step(self, device: Device, read_bytes: float) -> float:
        """Predict the seconds of a step that reads so many bytes of keys and values."""
        shape = self.shape
        activations = self.rows * FLOAT * (16 * shape.dim + 5 * shape.hidden) * shape.layers
        logits = self.rows * FLOAT * shape.codes * SAMPLING_PASSES
        return (
            self.predict_linear(device)
            + (read_bytes + activations + logits) / device.bandwidth
            + self.count_operators(device) * device.operator
        )

    def predict(self, device: Device) -> float:
        """Predict the seconds of the whole batch, all tokens."""
        steps = self.shape.geometry.n_tokens
        return steps * self.predict_step(device, self.average_bytes())

    @property
    def peak_bytes(self) -> int:
        """Above the weights: keys, values, bookkeeping, and what a step computes in passing."""
        shape = self.shape
        passing = FLOAT * (shape.codes + 4 * shape.hidden + 4 * shape.dim)
        sampling = min(self.rows, CHUNK) * shape.codes * (2 * FLOAT + 2 * 8)
        return self.kv_bytes + self.policy_bytes + self.rows * passing + sampling

    @property
    def linears(self) -> list[tuple[int, int]]:
        """`(out, in)` of every linear layer of a step."""
        return list_linears(self.shape)

    @property
    def linear_flops(self) -> int:
        """Operations of the linear layers of a step."""
        return 2 * self.rows * sum(out * into for out, into in self.linears)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights: matrices in the products' precision, embeddings in float32."""
        matrices = sum(out * into for out, into in self.linears)
        tables = (self.shape.codes + self.shape.classes + 1) * self.shape.dim
        return matrices * self.precision.itemsize + tables * FLOAT

    def count_operators(self, device: Device) -> int:
        """Count the small operators of a step."""
        return (FUSED_OPERATORS if device.has_memory else SMALL_OPERATORS) * self.shape.layers

    @property
    def process_bytes(self) -> int:
        """Weights and peak."""
        return self.weight_bytes + self.peak_bytes
