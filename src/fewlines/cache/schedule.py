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
        capacity = np.concatenate([layer.capacity for layer in layers])
        victims = np.concatenate([layer.known_victims for layer in layers])
        return cls(cache.slug, Placement(geometry, capacity, victims, layers[0].fold))

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
        tables = {"capacity": placed.capacity, "evicted_at": placed.evicted_at}
        tensors = {name: torch.from_numpy(table.astype(kind)) for name, table in tables.items()}
        if placed.several is not None:
            tensors["summaries"] = torch.from_numpy(placed.several.astype(kind))
        header = {"slug": self.slug, "fold": placed.fold}
        header |= {"grid": geometry.grid, "prefix": geometry.prefix}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Raises if `save` did not write the file."""
        tensors, header = read_tensors(path)
        if "evicted_at" not in tensors:
            raise FewlinesError(f"{path} is not a schedule; 'fewlines export-schedule' writes one")
        capacity, evicted_at = (
            tensors[name].numpy().astype(np.int64) for name in ("capacity", "evicted_at")
        )
        height, width = header["grid"]
        geometry = Geometry((height, width), header["prefix"], *capacity.shape)
        victims = np.full(evicted_at.shape, NOBODY)
        layer, head, token = np.nonzero(evicted_at < geometry.n_tokens)
        victims[layer, head, evicted_at[layer, head, token]] = token
        several = tensors["summaries"].numpy().astype(np.int64) if "summaries" in tensors else None
        placement = Placement(geometry, capacity, victims, header["fold"], several=several)
        return cls(header["slug"], placement)
