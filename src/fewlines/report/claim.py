"""What a run shows, in a paragraph: written from its tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fewlines.bench.harness import OK
from fewlines.config import BASE
from fewlines.report.readable import format_interval
from fewlines.report.results import Results


def state_claim(results: Results, table: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Say what memory, time and quality of the cache of the paper's comparison against the best
    full cache, and what the best adapted model makes of it."""
    if not results.experiment.paper_caches:
        full = table[table["policy"] == "full"].iloc[0]
        return f"The model has {full['nll']:.4f} nats/token and FID {full['fid_mean']:.2f}."
    cache = results.experiment.get_cache(results.experiment.paper_caches[0])
    base = table[table["model"] == BASE]
    this = (base["policy"] == cache.policy_text) & (base["budget"] == cache.budget_text)
    row, full = base[this].iloc[0], base[base["policy"] == "full"].iloc[0]
    ours = paper[(paper["model"] == BASE) & (paper["cache"] == cache.slug)].iloc[0]
    if ours["outcome"] != OK or np.isnan(ours["process_memory_ratio"]):
        gained = "could not be compared with the best full cache: memory ran out"
    else:
        gained = (
            f"needs {ours['process_memory_ratio']:.1f} times less memory, "
            f"{ours['peak_memory_ratio']:.1f} times above the weights, and "
            f"{ours['time_ratio']:.2f} times less time than the best full cache"
        )
    text = (
        f"With {cache.policy_text} at {cache.budget_text}, {int(row['capacity'])} of "
        f"{int(full['capacity'])} entries a head, decoding a batch of {int(ours['batch'])} "
        f"{gained}. FID is {row['fid_mean']:.2f} against "
        f"{full['fid_mean']:.2f} (± {full['fid_sd']:.2f} over seeds), and held-out images cost "
        f"{format_interval(row, 'nll_delta', '+.4f')} nats/token."
    )
    if "steps_delta" not in table:  # no adapted model, or nothing to compare it with
        return text
    shown = (table["trained_for"] == "this") & (table["policy"] != "full")
    looked_at = table["fid_mean"].notna() & table["steps_delta"].notna()
    adapted = table[shown & looked_at]
    if len(adapted) == 0:
        return text
    best = adapted.sort_values("steps_delta").iloc[0]
    return (
        f"{text} A model adapted to its cache, {best['policy']} at {best['budget']}, is "
        f"{format_interval(best, 'steps_delta', '+.4f')} nats/token from the full cache of "
        f"{results.experiment.find_baseline(best['model'])}."
    )
