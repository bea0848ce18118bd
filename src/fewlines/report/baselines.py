"""`baselines.csv`: every policy's options, searched alike, and each policy at its best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fewlines.metrics.likelihood import name_interval

MEASURED = (
    "policy", "budget", "capacity", "smallest",
    "nll", "nll_delta", "nll_delta_low", "nll_delta_high", "kl",
)  # fmt: skip


def make_baseline_table(searches: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Make one row per configuration that was tried, the best policy of each budget first.

    `place` is that of a configuration among those of its policy at its budget, `rank` that of the
    policy, by its best, among all policies at this budget; `behind` is how much worse a
    configuration is than the best of the best policy, paired over images. `smallest` is the least
    that a head may hold, `last_line` the share of KL that falls on the image's last line.
    """
    by_budget: dict[str, list[dict[str, Any]]] = {}
    for search in searches:
        ordered = sorted(search["trials"], key=lambda trial: trial["nll"])
        budget = ordered[0]["budget"]
        by_budget.setdefault(budget, []).append({**search, "trials": ordered})
    rows = []
    for several in by_budget.values():
        several.sort(key=lambda search: search["trials"][0]["nll"])
        first = _images(several[0]["trials"][0])
        for rank, search in enumerate(several, start=1):
            for place, trial in enumerate(search["trials"], start=1):
                lines = trial["kl_by_line"]
                row = {"searched": search["searched"], "rank": rank, "place": place}
                row |= {key: trial[key] for key in MEASURED}
                row |= name_interval("behind", _images(trial) - first)
                row["last_line"] = lines[-1] / sum(lines) if sum(lines) else 0.0
                rows.append({**row, "likelihood_images": len(first)})
    return pd.DataFrame(rows)


def _images(trial: dict[str, Any]) -> Tensor:
    return torch.tensor(trial["nll_of_images"], dtype=torch.float64)
