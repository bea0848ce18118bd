"""Where the seconds of a decode step go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from fewlines.models.llamagen.engine import PackedAttention, PackedLinear


def profile_steps(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of a run of a prepared model on the CPU: `linear` layers; `attention`, rotation
    included; `between` them, norms, SwiGLU and residuals; `outside` the model, sampling, slots
    and Python."""
    watch = _Stopwatch()
    watch.time(model, "model")
    for module in model.modules():
        if isinstance(module, PackedAttention):
            watch.time(module, "attention")
            watch.time(module.wqkv, "projections")
            watch.time(module.wo, "projections")
        if isinstance(module, PackedLinear):
            watch.time(module, "linear")
    start = time.perf_counter()
    run()
    total = time.perf_counter() - start
    watch.stop()
    spent = watch.seconds
    attention = spent["attention"] - spent["projections"]
    return {
        "linear": spent["linear"],
        "attention": attention,
        "between": spent["model"] - spent["linear"] - attention,
        "outside": total - spent["model"],
    }


class _Stopwatch:
    """Adds up the time spent in modules, by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("model", "attention", "projections", "linear"), 0.0)
        self.handles: list[Any] = []

    def time(self, module: nn.Module, name: str) -> None:
        started: list[float] = []

        def before(*_: Any) -> None:
            started.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.seconds[name] += time.perf_counter() - started.pop()

        self.handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
