"""What deciding costs: every bounded cache beside the first."""

from __future__ import annotations

from dataclasses import replace

from fewlines.bench.efficiency import make_settings
from fewlines.bench.policy_times import measure_policies
from fewlines.config.settings import EfficiencySettings


def test_every_bounded_cache_is_timed_beside_the_first():
    policies = [("lines", False), ("random", True), ("line_ar", False)]
    caches = [{"policy": name, "budget": {"lines": 2}, "merge": merge} for name, merge in policies]
    run = {"grids": [6], "batches": [2], "engines": ["lean"], "caches": caches}
    ((_, setting),) = make_settings(EfficiencySettings(repeats=3, runs=[run]), threads=1).items()
    setting = replace(setting, shape=replace(setting.shape, layers=2))  # of twelve: seconds
    rows = measure_policies(setting, rounds=3)
    assert [row["policy"] for row in rows] == ["lines", "random+merge", "line_ar"]
    for row in rows:
        assert row["against"] == "lines"
        assert row["seconds_per_step"] > 0
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
