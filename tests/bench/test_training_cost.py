"""What a step of training costs: every cache on every grid, the full one first."""

from __future__ import annotations

from fewlines.bench.training_cost import measure_training
from fewlines.config.caches import CacheSettings
from fewlines.config.settings import TrainingCostSettings
from fewlines.models.llamagen import Transformer
from fewlines.models.llamagen.settings import LlamaGenSettings


def test_every_cache_on_every_grid_against_full_attention():
    model = LlamaGenSettings(dim=16, layers=1, heads=2)
    few = CacheSettings(policy="random", budget={"lines": 1}, merge=True)
    settings = TrainingCostSettings(grids=(4, 6), tokens=40, repeats=2, caches=(few,))
    rows = measure_training(Transformer, model, settings)
    assert [(row["grid"], row["policy"], row["images"]) for row in rows] == [
        ("4x4", "full", 2),
        ("4x4", "random+merge", 2),
        ("6x6", "full", 1),
        ("6x6", "random+merge", 1),
    ]
    for row in rows:
        assert row["seconds_per_step"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert (row["speedup"] == 1) == (row["policy"] == "full")
