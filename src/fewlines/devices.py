"""Devices that are not at hand, by what counts for a decode step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What a decode step asks of a device.

    Attributes:
        name: of the device.
        bandwidth: bytes/s that reading reaches.
        flops: FLOP/s that matrix products reach.
        memory: bytes.
        operator: seconds that starting a small operator takes.
        exact: FLOP/s of float32 products; None where `flops` is of whatever was measured.
        has_memory: whether it has one of its own, as a GPU has, or shares the processor's.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    operator: float
    exact: float | None = None
    has_memory: bool = True

    def at(self, precision: torch.dtype) -> Device:
        """Give the device as it is for products of a precision."""
        if precision != torch.float32 or self.exact is None:
            return self
        return replace(self, flops=self.exact)


def make_device(
    name: str, terabytes: float, teraflops: float, exact: float, gigabytes: float
) -> Device:
    """Make a device from its data sheet: 85% of its bandwidth and 60% of its rates, bf16 without
    sparsity and float32 without tensor cores, which is what well-tuned kernels reach; operators
    start from a CUDA graph."""
    rates = (0.85e12 * terabytes, 0.6e12 * teraflops)
    return Device(name, *rates, 1e9 * gigabytes, 2e-6, exact=0.6e12 * exact)


# Data sheets: TB/s, dense bf16 and float32 TFLOP/s, GB.
DEVICES = {
    device.name: device
    for device in (
        make_device("h200", 4.8, 989, 67, 141),
        make_device("h100", 3.35, 989, 67, 80),
        make_device("a100", 2.04, 312, 19.5, 80),
        make_device("a100-40gb", 1.56, 312, 19.5, 40),
        make_device("l40s", 0.864, 362, 91.6, 48),
        make_device("rtx4090", 1.01, 165, 82.6, 24),
        make_device("t4", 0.32, 65, 8.1, 16),
    )
}
