"""What deciding costs: policies at the same capacity, each beside the first in one process, a line
of one and a line of the other in turn: whatever disturbs the machine disturbs both alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fewlines import machine
from fewlines.bench.cost import name_ratios
from fewlines.bench.steps import DecodeSteps, Setting, make_random_model
from fewlines.progress import progress


@torch.inference_mode()
def measure_policies(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Measure each bounded cache of a setting: one dict of `seconds_per_step`, and median and
    quartiles of `ratio` to the first of them, over the last line but one. The first beside itself
    says what the machine's noise is."""
    geometry = setting.shape.geometry
    limited = [row for row in setting.rows if row.cache.budget is not None]
    first = limited[0]
    model = make_random_model(setting, first.batch)
    plain = DecodeSteps(model, setting, first)
    position = geometry.n_tokens - 2 * geometry.width
    bar = progress("what deciding costs", len(limited) * rounds, "rounds")
    rows = []
    for row in limited:
        pair = (plain, DecodeSteps(model, setting, row))
        for steps in pair:  # kernels are compiled, pages are mapped
            steps.line(position)
        taken: tuple[list[float], list[float]] = ([], [])
        for nth in range(rounds):
            for which in (0, 1) if nth % 2 else (1, 0):
                taken[which].append(pair[which].line(position))
            bar.update()
        rows.append(
            {
                "shape": setting.shape_name,
                "grid": f"{geometry.grid[0]}x{geometry.grid[1]}",
                "n_tokens": geometry.n_tokens,
                "batch": row.batch,
                "storage": machine.dtype_name(row.storage),
                "policy": row.cache.policy_text,
                "budget": row.cache.budget_text,
                "seconds_per_step": float(np.median(taken[1])),
                "against": first.cache.policy_text,
                **name_ratios("ratio", taken[1], taken[0]),
                "rounds": rounds,
                "processor": machine.processor(),
                "torch": torch.__version__,
            }
        )
    bar.close()
    return rows
