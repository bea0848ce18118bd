"""Runs of other seeds beside the tracked one."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from fewlines.report.seeds import seed_numbers

ROWS = [
    # model, policy, budget, nll_delta, steps_delta, distil, fid
    ("base", "full", "all", 0.0, None, None, 8.0),
    ("base", "linear", "lines: 2", 0.08, None, None, 40.0),
    ("base", "oracle", "lines: 2", 0.04, None, None, None),
    ("base", "scheduled+fold", "lines: 2", 0.01, None, None, 9.0),
    ("base", "lines", "lines: 3", 0.2, None, None, None),  # the tracked run's alone
    ("base+steps:taught", "full", "all", 0.0, 0.0, 0.5, 7.0),
    ("adapted:2lines", "scheduled+fold", "lines: 2", -0.004, 0.002, 0.5, 7.7),
]
COLUMNS = ["model", "policy", "budget", "nll_delta", "steps_delta", "distil", "fid_mean"]


def of_a_run(times: float) -> pd.DataFrame:
    """What a cache loses is so many times that of the tracked run."""
    table = pd.DataFrame(ROWS, columns=COLUMNS)
    ours = table["policy"] == "scheduled+fold"
    table.loc[ours, ["nll_delta", "steps_delta", "fid_mean"]] *= times
    half = 0.001
    return table.assign(
        nll=1.15 + table["nll_delta"], fid_sd=0.1, seeds=3, samples=1000,
        steps_delta_low=table["steps_delta"] - half, steps_delta_high=table["steps_delta"] + half,
    )  # fmt: skip


@pytest.fixture
def reference(tmp_path):
    of_a_run(1).to_csv(tmp_path / "cache.csv", index=False)
    others = pd.concat([of_a_run(2).assign(run="seed-1"), of_a_run(3).assign(run="seed-2")])
    others = others[others["policy"] != "lines"]
    others.to_csv(tmp_path / "seeds.csv", index=False)
    others.dropna(subset="fid_mean").to_csv(tmp_path / "seeds-fid.csv", index=False)
    return tmp_path


def rows_of(reference) -> list[str]:
    return re.sub(" +", " ", "\n".join(seed_numbers(reference))).splitlines()


def test_a_cache_has_a_column_for_each_seed_and_the_span_of_its_ratios(reference):
    rows = rows_of(reference)
    assert "| cache | tracked | seed-1 | seed-2 | × linear | × oracle |" in rows
    assert (
        "| scheduled+fold, lines: 2 | 0.0100 | 0.0200 | 0.0300 | 0.12 … 0.38 | 0.25 … 0.75 |"
        in rows
    )
    assert "| linear, lines: 2 | 0.0800 | 0.0800 | 0.0800 | | 2.00 … 2.00 |" in rows
    assert not any("lines, lines: 3" in row for row in rows)  # no other seed has it


def test_adapted_models_are_compared_with_the_full_cache_of_their_loss(reference):
    rows = rows_of(reference)
    after, fid = (row for row in rows if row.startswith("| adapted:2lines, scheduled+fold"))
    assert "| +0.0020 ± 0.0010 | +0.0040 ± 0.0010 | +0.0060 ± 0.0010 |" in after
    assert "| 7.70 ± 0.10 (1.10×) | 15.40 ± 0.10 (2.20×) |" in fid
    assert any("base, scheduled+fold" in row and "9.00 ± 0.10 (1.12×)" in row for row in rows)


def test_nothing_is_said_where_no_other_seed_was_measured(tmp_path):
    assert seed_numbers(tmp_path) == []
