"""What deciding costs: every bounded cache beside the first."""

from __future__ import annotations

from dataclasses import replace

from fewlines.config import EfficiencySettings
from fewlines.measure.efficiency import settings_of
from fewlines.measure.policy_times import policy_times


def test_every_bounded_cache_is_timed_beside_the_first():
    policies = [("lines", False), ("random", True), ("linear", False)]
    caches = [{"policy": name, "budget": {"lines": 2}, "fold": fold} for name, fold in policies]
    run = {"grids": [6], "batches": [2], "engines": ["lean"], "caches": caches}
    ((_, setting),) = settings_of(EfficiencySettings(repeats=3, runs=[run]), threads=1).items()
    setting = replace(setting, shape=replace(setting.shape, layers=2))  # of twelve: seconds
    rows = policy_times(setting, rounds=3)
    assert [row["policy"] for row in rows] == ["lines", "random+fold", "linear"]
    for row in rows:
        assert row["against"] == "lines"
        assert row["seconds_per_step"] > 0
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
