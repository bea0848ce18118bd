"""A run's folder, read: where each stage's result lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fewlines import machine
from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Cache
from fewlines.config import BASE, Experiment
from fewlines.files import read_json
from fewlines.measure.efficiency import settings_of
from fewlines.measure.outcome import OK
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer, TransformerShape

UNKNOWN = {"outcome": OK} | dict.fromkeys(("kv_bytes", "peak_bytes", "process_bytes"), math.nan)


def _complete(cost: dict[str, Any]) -> dict[str, Any]:
    """With a number everywhere: none, where memory ran out."""
    rows = [{**UNKNOWN, "timeline": [], **row} for row in cost["rows"]]
    return {**cost, "rows": [{**row, "seconds": row["seconds"] or [math.nan]} for row in rows]}


@dataclass(frozen=True)
class Results:
    """Everything that was measured in `folder` for an experiment."""

    experiment: Experiment
    folder: Path

    @cached_property
    def geometry(self) -> Geometry:
        """Of the run's model."""
        return self.shape.geometry

    @cached_property
    def shape(self) -> TransformerShape:
        return load_network(self.folder / BASE / "model.safetensors", Transformer).shape

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The rows, model and cache, whose images are shown."""
        return [row for row in self.experiment.rows if self.experiment.shown(row[1], row[0])]

    @cached_property
    def calibration(self) -> Calibration:
        """The base model's; raises if there is none."""
        return Calibration.load(self.folder / BASE / "calibration.safetensors")

    def cache(self, slug: str) -> Cache:
        """With the run's calibration, if it needs one."""
        cache = self.experiment.cache(slug)
        if cache.split == "summaries":
            return cache.calibrated(self.folder / BASE / "summaries.safetensors")
        return replace(cache, calibration=self.calibration) if cache.needs_calibration else cache

    @property
    def scheduled(self) -> list[str]:
        """Caches that go by a schedule, the calibrated splits first."""
        caches = self.experiment.cache_by_slug
        found = [slug for slug, cache in caches.items() if cache.policy.name == "scheduled"]
        return sorted(found, key=lambda slug: caches[slug].split != "calibrated")

    def quality(self, cache: str, model: str = BASE) -> dict[str, Any]:
        return self._read(f"{model}/quality/{cache}.json")

    def likelihood(self, cache: str, model: str = BASE) -> dict[str, Any]:
        return self._read(f"{model}/likelihood/{cache}.json")

    def cost(self, cache: str) -> dict[str, Any]:
        return _complete(self._read(f"cost/{cache}.json"))

    def floor(self, name: str) -> dict[str, Any]:
        """`real` or `reconstruction`."""
        return self._read(f"floors/{name}.json")

    @property
    def paper(self) -> dict[str, Any]:
        return _complete(self._read("paper.json"))

    @property
    def storage(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read_json(self.folder / "storage.json")
        return rows

    @property
    def efficiency(self) -> list[dict[str, Any]]:
        """Of every setting of published shapes."""
        names = settings_of(self.experiment.efficiency, machine.cores())
        return [self._read(f"efficiency/{name}.json") for name in names]

    def metrics(self, network: str) -> dict[str, Any]:
        """Of the `tokenizer`, the `classifier`, or a model: `base/model`, `base/model-test`."""
        return self._read(f"{network}.json")

    def samples(self, cache: str, model: str = BASE) -> Path:
        return self.folder / f"{model}/samples/{cache}.safetensors"

    def _read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self.folder / name)
        return content
