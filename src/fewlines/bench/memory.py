"""Peak memory of a stretch of code: exact on Linux and on a GPU, an upper bound elsewhere."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_method() -> str:
    """How this machine's peaks are read."""
    if torch.cuda.is_available():
        return "torch.cuda.max_memory_allocated"
    return "VmHWM, reset before decoding" if _can_reset() else "ru_maxrss of the whole process"


def reset_peak() -> None:
    """Start a new peak here. Freed memory is handed back first, so that reuse of it counts."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if _can_reset():
        CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM to the current resident size


def peak_bytes() -> int:
    """Highest resident bytes since `reset_peak`; where the peak can't be reset, of the process's
    whole life."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Resident bytes now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS") if STATUS.exists() else peak_bytes()


def _can_reset() -> bool:
    return CLEAR_REFS.exists()


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
