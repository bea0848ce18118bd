"""How a measurement ended: running out of memory is a result, not a failure."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

OK, OUT_OF_MEMORY, TIME_LIMIT = "ok", "out of memory", "time limit"


def first_to_go() -> None:
    """Of all processes of the machine, should its memory run out: this one, nobody else."""
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        adjustment.write_text("1000")


def or_out_of_memory(work: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or `OUT_OF_MEMORY`."""
    try:
        return work(*arguments)
    except (MemoryError, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # as torch says it on the CPU
            raise
        return OUT_OF_MEMORY


def ran_out_of_memory(process: BaseProcess) -> bool:
    """Of a process that has ended without an answer: whether the kernel killed it."""
    process.join()
    return process.exitcode == -9
