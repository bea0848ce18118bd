"""What a decode step does, operator by operator, and what that costs on a device.

Of a decode step only three things count: the linear layers (arithmetic, or reading the weights),
reading keys and values, and the many small operators in between, whose cost is starting them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fewlines.cache.placement import Cache
from fewlines.cache.policy import ScoringPolicy
from fewlines.generate.sampler import CHUNK
from fewlines.models.transformer import TransformerShape

SMALL_OPERATORS = 24  # of a layer, between the products: norms, rotation, SwiGLU, residuals
SAMPLING_PASSES = 6  # over the logits
FLOAT = 4  # bytes of an activation


@dataclass(frozen=True)
class Device:
    """Attributes:
    bandwidth: bytes/s that reading reaches.
    flops: FLOP/s that matrix products reach with very many rows.
    flops_at: FLOP/s measured at some numbers of rows, where they were measured.
    operator: seconds that starting a small operator takes.
    memory: bytes.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    operator: float
    flops_at: Mapping[int, float] = field(default_factory=dict)

    def rate(self, rows: int) -> float:
        """FLOP/s of matrix products of so many rows."""
        if not self.flops_at:
            return self.flops
        known = sorted(self.flops_at)
        return float(np.interp(rows, known, [self.flops_at[count] for count in known]))


def published(name: str, terabytes: float, teraflops: float, gigabytes: float) -> Device:
    """A device from its data sheet: 85% of its bandwidth and 60% of its dense bf16 rate, which is
    what well-tuned kernels reach; operators start from a CUDA graph."""
    return Device(name, 0.85e12 * terabytes, 0.6e12 * teraflops, 1e9 * gigabytes, 2e-6)


# Data sheets: TB/s, dense bf16 TFLOP/s, GB.
DEVICES = {
    device.name: device
    for device in (
        published("h200", 4.8, 989, 141),
        published("h100", 3.35, 989, 80),
        published("a100", 2.04, 312, 80),
        published("a100-40gb", 1.56, 312, 40),
        published("l40s", 0.864, 362, 48),
        published("rtx4090", 1.01, 165, 24),
        published("t4", 0.32, 65, 16),
    )
}


def linears(shape: TransformerShape) -> list[tuple[int, int]]:
    """`(out, in)` of every linear layer of a step."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    block = [
        (qkv, shape.dim),
        (shape.dim, shape.dim),
        (shape.hidden, shape.dim),
        (shape.hidden, shape.dim),
        (shape.dim, shape.hidden),
    ]
    return block * shape.layers + [(shape.codes, shape.dim)]


def linear_flops(shape: TransformerShape, rows: int) -> int:
    """Floating-point operations of all linear layers for `rows` positions."""
    return 2 * rows * sum(out * into for out, into in linears(shape))


def weight_bytes(shape: TransformerShape, itemsize: int) -> int:
    """Of matrices in `itemsize` bytes, embeddings in float32."""
    matrices = sum(out * into for out, into in linears(shape))
    return matrices * itemsize + (shape.codes + shape.classes + 1) * shape.dim * FLOAT


def entry_bytes(shape: TransformerShape, itemsize: int) -> int:
    """Of one cached position of one row, in one head of one layer."""
    return 2 * shape.head_dim * itemsize


@dataclass(frozen=True)
class Decode:
    """A decode whose cost is asked for.

    Attributes:
        rows: of the batch; under guidance twice the images.
        weight_itemsize, kv_itemsize: bytes of a weight, and of a stored key or value.
        whole: attention reads the whole buffer at every step, as a stock cache does.
    """

    shape: TransformerShape
    rows: int
    cache: Cache
    weight_itemsize: int
    kv_itemsize: int
    whole: bool = False

    @property
    def kv_bytes(self) -> int:
        """Held at the end of the image, exact."""
        placement = self.cache.place(self.shape.geometry)
        entries = placement.kv_entries() * entry_bytes(self.shape, self.kv_itemsize)
        exact = int(placement.summaries.sum()) if self.kv_itemsize < FLOAT else 0  # see `HeadGroup`
        summaries = exact * entry_bytes(self.shape, FLOAT)
        return (entries + summaries) * self.rows

    @property
    def policy_bytes(self) -> int:
        """Of a scoring policy's bookkeeping: positions, and what it adds up or remembers."""
        placement = self.cache.place(self.shape.geometry)
        policy = placement.scoring
        if not isinstance(policy, ScoringPolicy):
            return 0
        floats = {None: 0, "line_query": 0, "attention": policy.window}.get(policy.needs, 1)
        return placement.kv_entries() * self.rows * (8 + FLOAT * floats)

    def step_read_bytes(self, step: int) -> int:
        """Keys and values read when image token `step` goes in."""
        placement = self.cache.place(self.shape.geometry)
        seen = placement.kv_entries() if self.whole else self._written(step)
        return seen * entry_bytes(self.shape, self.kv_itemsize) * self.rows

    def mean_read_bytes(self) -> float:
        """Mean over the image's steps."""
        steps = np.linspace(0, self.shape.geometry.n_tokens - 2, 65).astype(int)
        reads = [self.step_read_bytes(int(step)) for step in np.unique(steps)]
        return float(np.trapezoid(reads, np.unique(steps)) / (steps[-1] - steps[0]))

    def _written(self, step: int) -> int:
        geometry = self.shape.geometry
        capacity = self.cache.place(geometry).capacity
        return int(np.minimum(capacity, step + 1).sum()) + capacity.size * geometry.prefix

    def linear_seconds(self, device: Device) -> float:
        rate = device.rate(self.rows)
        return sum(
            max(
                2 * self.rows * out * into / rate,
                out * into * self.weight_itemsize / device.bandwidth,
            )
            for out, into in linears(self.shape)
        )

    def step_seconds(self, device: Device, read_bytes: float) -> float:
        """Seconds of a step that reads so many bytes of keys and values."""
        shape = self.shape
        activations = self.rows * FLOAT * (16 * shape.dim + 5 * shape.hidden) * shape.layers
        logits = self.rows * FLOAT * shape.codes * SAMPLING_PASSES
        return (
            self.linear_seconds(device)
            + (read_bytes + activations + logits) / device.bandwidth
            + SMALL_OPERATORS * shape.layers * device.operator
        )

    def seconds(self, device: Device) -> float:
        """Of the whole batch, all tokens."""
        steps = self.shape.geometry.n_tokens
        return steps * self.step_seconds(device, self.mean_read_bytes())

    @property
    def peak_bytes(self) -> int:
        """Above the weights: keys, values, bookkeeping, and what a step computes in passing."""
        shape = self.shape
        passing = FLOAT * (shape.codes + 4 * shape.hidden + 4 * shape.dim)
        sampling = min(self.rows, CHUNK) * shape.codes * (2 * FLOAT + 2 * 8)
        return self.kv_bytes + self.policy_bytes + self.rows * passing + sampling

    @property
    def process_bytes(self) -> int:
        """Weights and peak."""
        return weight_bytes(self.shape, self.weight_itemsize) + self.peak_bytes
