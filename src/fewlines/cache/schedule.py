"""What a cache decided before the first token, without the calibration that it went by: a few
kilobytes that lie beside the weights of a model that is served with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Cache, Placement, make_placement
from fewlines.cache.policy import NOBODY
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors

TABLES = ("room", "summaries", "evicted_at")  # of a placement, and names in a file


@dataclass(frozen=True)
class Schedule:
    """Who goes when, in every head; it takes a `Cache`'s place wherever images are drawn.

    Attributes:
        slug: the cache it was made from.
        placement: what that cache decided, for one model and image size.
    """

    slug: str
    placement: Placement

    @classmethod
    def of(cls, cache: Cache, geometry: Geometry) -> Schedule:
        """Raises if the cache decides while an image is drawn, or from the finished image."""
        placement = cache.place(geometry)
        _ = placement.known_victims
        return cls(cache.slug, placement)

    @classmethod
    def by_layer(
        cls, cache: Cache, geometry: Geometry, calibrations: Iterable[Calibration]
    ) -> Schedule:
        """The same by a calibration that comes one layer `(1, H, N, N)` after the other, since all
        of it would not fit memory; raises if the budget is not the same in every layer."""
        if cache.split != "uniform":
            raise FewlinesError(
                f"cache: {cache.slug} shares its budget among layers and needs the calibration of "
                "all of them; write 'split: uniform', or --calibration"
            )
        one = replace(geometry, layers=1)
        layers = []
        for calibration in calibrations:
            layers.append(make_placement(replace(cache, calibration=calibration), one))
            _ = layers[-1].known_victims  # or it raises, before the other layers are measured
        tables = [(layer.room, layer.summaries, layer.known_victims) for layer in layers]
        room, summaries, victims = map(np.concatenate, zip(*tables, strict=True))
        return cls(cache.slug, Placement(geometry, room, summaries, victims))

    def place(self, geometry: Geometry) -> Placement:
        """As `Cache.place`; raises for any other model or image size."""
        made = self.placement.geometry
        if geometry != made:
            raise FewlinesError(
                f"schedule: {self.slug} was made for another model: {made}, not {geometry}; "
                "run 'fewlines export-schedule' for it"
            )
        return self.placement

    def save(self, path: Path) -> None:
        placed, geometry = self.placement, self.placement.geometry
        kind = np.min_scalar_type(geometry.n_tokens)  # unsigned: the steps at which tokens go
        tensors = {name: torch.from_numpy(getattr(placed, name).astype(kind)) for name in TABLES}
        header = {"slug": self.slug, "grid": geometry.grid, "prefix": geometry.prefix}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Raises if `save` did not write the file."""
        tensors, header = read_tensors(path)
        if not set(TABLES) <= set(tensors):
            raise FewlinesError(f"{path} is not a schedule; 'fewlines export-schedule' writes one")
        room, summaries, evicted_at = (tensors[name].numpy().astype(np.int64) for name in TABLES)
        height, width = header["grid"]
        geometry = Geometry((height, width), header["prefix"], *room.shape)
        victims = np.full(evicted_at.shape, NOBODY)
        layer, head, token = np.nonzero(evicted_at < geometry.n_tokens)
        victims[layer, head, evicted_at[layer, head, token]] = token
        return cls(header["slug"], Placement(geometry, room, summaries, victims))
