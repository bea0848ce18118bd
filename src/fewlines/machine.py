"""The machine underneath: its precision, its speed, its name."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

CPUINFO = Path("/proc/cpuinfo")
M_MMAP_THRESHOLD = -3  # glibc, malloc.h
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations and tables write it: `float32`."""
    return str(dtype).removeprefix("torch.")


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(wanted: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on processors that have instructions for it; elsewhere
    torch multiplies bfloat16 matrices hundreds of times slower than float32 (pytorch #146508)."""
    if wanted == "auto":
        return torch.bfloat16 if torch.cuda.is_available() or has_bf16() else torch.float32
    return DTYPES[wanted]


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, and oneDNN makes use of it."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}
    return bool(flags & {*_read_cpuinfo().split()}) and onednn_takes(torch.bfloat16)


def _read_cpuinfo() -> str:
    """What the kernel says of the processor; nothing where it is not Linux."""
    return CPUINFO.read_text() if CPUINFO.exists() else ""


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix products of this precision here: of bfloat16 it has none where
    there is only AVX2, or where ONEDNN_MAX_CPU_ISA says so."""
    if not torch.backends.mkldnn.is_available():
        return False
    bf16: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or dtype == torch.float32


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that a new process can have, on a GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def return_large_blocks() -> None:
    """Return blocks of 200 kB and more to the system as they are freed. glibc else raises that
    limit to the largest block seen and keeps what lies between small ones, as features between the
    images that they were computed from: 1.6 times the memory at ten times the images."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 200_000)


def instructions() -> str:
    """The vector instructions that decide the rate of matrix products."""
    known = ("amx_bf16", "avx512_fp16", "avx512_bf16", "avx512f", "avx2", "f16c")
    flags = _read_cpuinfo().split()
    return " ".join(name for name in known if name in flags) if flags else platform.machine()


def processor() -> str:
    """The processor's name, as the kernel or Python has it."""
    named = re.search(r"^model name\s*: *(.*\S)", _read_cpuinfo(), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


@functools.cache
def has_triton() -> bool:
    """Whether Triton can compile kernels for the GPU here: it wants a C compiler, too."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return (
        importlib.util.find_spec("triton") is not None
        and any(shutil.which(each) for each in compilers)
        and torch.cuda.get_device_capability() >= (7, 0)
    )


def list_compilers() -> dict[str, str]:
    """List the versions of what compiles the decode engine, and of its peers, where they are."""
    names = ("numba", "triton", "transformers")
    return {name: version(name) for name in names if importlib.util.find_spec(name)}


def gpu() -> str | None:
    """The GPU's name, where there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def describe() -> dict[str, Any]:
    """What a reader needs to place a number: processor, cores, versions."""
    packages = ("torch", "torchmetrics", "torch-fidelity", "snakemake", "pandas", "numpy")
    return {
        "processor": processor(),
        "cores": cores(),
        "bf16_instructions": has_bf16(),
        "gpu": gpu(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def synchronise() -> None:
    """Wait for a GPU; on the CPU there is nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_gemm_rate(dtype: torch.dtype = torch.float32, side: int = 1536) -> float:
    """Measure the best rate of a square matrix product, in FLOP/s."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(side, side, generator=generator).to(device(), dtype)
    return 2 * side**3 / best_seconds(lambda: a @ a)


def take_seconds(operation: Callable[[], Any]) -> float:
    """Take the seconds of an operation, to its end on a GPU too."""
    synchronise()
    start = time.perf_counter()
    operation()
    synchronise()
    return time.perf_counter() - start


def best_seconds(operation: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest of so many runs after a first."""
    operation()
    return min(take_seconds(operation) for _ in range(repeats))
