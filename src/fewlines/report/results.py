"""A run's folder, read: where each stage's result lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fewlines import machine
from fewlines.bench.efficiency import make_settings
from fewlines.bench.harness import OK
from fewlines.cache.spec import Cache
from fewlines.calibration.data import Calibration
from fewlines.config import BASE, Experiment
from fewlines.files import read_json
from fewlines.models.base import Model
from fewlines.models.checkpoint import load_shape

MEASURES = ("fid", "kid", "is", "precision", "recall")  # of a set of images
UNKNOWN = {"outcome": OK} | dict.fromkeys(("kv_bytes", "peak_bytes", "process_bytes"), math.nan)


def _complete(cost: dict[str, Any]) -> dict[str, Any]:
    """With a number everywhere: none, where memory ran out."""
    rows = [{**UNKNOWN, "timeline": [], **row} for row in cost["rows"]]
    return {**cost, "rows": [{**row, "seconds": row["seconds"] or [math.nan]} for row in rows]}


@lru_cache
def _load_network(path: Path) -> Model:
    """Without its weights."""
    family, shape = load_shape(path)
    with torch.device("meta"):
        network: Model = family(shape)
    return network


@dataclass(frozen=True)
class Results:
    """Everything that was measured in `folder` for an experiment."""

    experiment: Experiment
    folder: Path

    def load_network(self, model: str = BASE) -> Model:
        """Load a model of the run, without its weights; a task has its model's."""
        weights = self.experiment.get_weights(model)
        return _load_network(self.folder / weights / "model.safetensors")

    @cached_property
    def calibration(self) -> Calibration:
        """The base model's; raises if there is none."""
        return Calibration.load(self.folder / BASE / "calibration.safetensors")

    def get_cache(self, slug: str) -> Cache:
        """Give a cache with the run's calibration, if it needs one."""
        cache = self.experiment.get_cache(slug)
        if cache.requires == "band losses":
            return cache.calibrated(self.folder / BASE / "bands.safetensors")
        return replace(cache, calibration=self.calibration) if cache.requires else cache

    def read_quality(self, cache: str, model: str = BASE) -> dict[str, Any]:
        """Read what was measured of the images of a row; empty where none were drawn."""
        if not self.experiment.is_drawn(cache, model):
            return {}
        return self._read(f"{model}/quality/{cache}.json")

    def read_sets(self, cache: str, model: str = BASE) -> pd.DataFrame:
        """Read the measures of a row's images, one line for each seed; none where none were
        drawn."""
        return pd.DataFrame(self.read_quality(cache, model).get("sets", []), columns=MEASURES)

    def read_likelihood(self, cache: str, model: str = BASE) -> dict[str, Any]:
        """Read the likelihood of a row."""
        return self._read(f"{self.experiment.get_scored(model)}/likelihood/{cache}.json")

    def read_cost(self, cache: str, architecture: str | None = None) -> dict[str, Any]:
        """Read time and memory of a cache, or of a model of another family."""
        name = f"{architecture}/cost" if architecture else f"cost/{cache}"
        return _complete(self._read(f"{name}.json"))

    def read_reference(self, name: str) -> dict[str, Any]:
        """Read the reference scores of `real` images or their `reconstruction`."""
        return self._read(f"reference/{name}.json")

    @property
    def paper(self) -> dict[str, Any]:
        """Time and memory at the batch of the paper's comparison."""
        return _complete(self._read("paper.json"))

    @property
    def storage(self) -> list[dict[str, Any]]:
        """What 16 bits change."""
        rows: list[dict[str, Any]] = read_json(self.folder / "storage.json")
        return rows

    @property
    def efficiency(self) -> list[dict[str, Any]]:
        """Every setting of published shapes; none where the family has no such shapes."""
        if not self.experiment.family.published:
            return []
        names = make_settings(self.experiment.efficiency, machine.cores())
        return [read_json(self.folder / f"efficiency/{name}.json") for name in names]

    def read_metrics(self, network: str) -> dict[str, Any]:
        """Read of the `tokenizer`, the `classifier`, or a model: `base/model`,
        `base/model-test`."""
        return self._read(f"{network}.json")

    def find_samples(self, cache: str, model: str = BASE) -> Path:
        """Find the file of a row's samples."""
        return self.folder / f"{model}/samples/{cache}.safetensors"

    def _read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self.folder / name)
        return {key: found for key, found in content.items() if key != "measured"}  # its stamp
