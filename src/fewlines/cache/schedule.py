"""What a cache decided before the first token, without the calibration that it went by: a few
kilobytes that lie beside the weights of a model that is served with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import NO_VICTIM
from fewlines.cache.spec import Cache, make_plan
from fewlines.calibration.data import Calibration
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.geometry import Geometry

TABLES = ("capacity", "merge_slots", "evicted_at")  # of a plan, and names in a file


@dataclass(frozen=True)
class Schedule:
    """The victim of every step in every head; it takes the place of a `Cache` wherever images are
    drawn.

    Attributes:
        slug: the cache it was made from.
        evictions: what that cache decided, for one model and image size.
        weights: some of that model's, see `sample_weights`; None where nobody knows.
        model: its name, if it has one.
    """

    slug: str
    evictions: EvictionPlan
    weights: Tensor | None = None
    model: str = ""

    def check_weights(self, model: nn.Module) -> None:
        """Warn where a model has other weights than those that the schedule was made for: it may
        serve those that were fine-tuned from them."""
        if self.weights is None:
            return
        ours = sample_weights(model)
        if ours.shape != self.weights.shape or not torch.allclose(
            ours, self.weights, rtol=0.02, atol=1e-4
        ):
            warnings.warn(
                f"schedule: {self.slug} was made for other weights of this shape"
                f"{f' ({self.model})' if self.model else ''}; it serves those "
                "fine-tuned from them, and of all others 'fewlines export-schedule' makes its own",
                stacklevel=3,
            )

    @classmethod
    def of(cls, cache: Cache, geometry: Geometry) -> Schedule:
        """Raises if the cache decides while an image is drawn, or from the finished image."""
        plan = cache.plan(geometry)
        _ = plan.known_victims
        return cls(cache.slug, plan)

    @classmethod
    def settle(cls, cache: Cache, geometry: Geometry) -> Cache | Schedule:
        """A cache as it is served: by its schedule, without the calibration that it went by; itself
        where it decides while an image is drawn."""
        plan = cache.plan(geometry)
        return cache if plan.victims is None else cls(cache.slug, plan)

    @classmethod
    def by_layer(
        cls, cache: Cache, geometry: Geometry, calibrations: Iterable[Calibration]
    ) -> Schedule:
        """The same by a calibration that comes one layer `(1, H, N, N)` after the other, since all
        of it would not fit memory; raises if the budget is not the same in every layer."""
        if cache.allocation != "uniform":
            raise FewlinesError(
                f"cache: {cache.slug} shares its budget among layers and needs the calibration of "
                "all of them; write 'allocation: uniform', or --calibration"
            )
        one = replace(geometry, layers=1)
        layers = []
        for calibration in calibrations:
            layers.append(make_plan(replace(cache, calibration=calibration), one))
            _ = layers[-1].known_victims  # or it raises, before the other layers are measured
        tables = [(layer.capacity, layer.merge_slots, layer.known_victims) for layer in layers]
        capacity, merge_slots, victims = map(np.concatenate, zip(*tables, strict=True))
        return cls(cache.slug, EvictionPlan(geometry, capacity, merge_slots, victims))

    def plan(self, geometry: Geometry) -> EvictionPlan:
        """As `Cache.plan`, for a prefix of any length; raises for any other model or image size."""
        made = self.evictions.geometry
        if geometry != replace(made, prefix=geometry.prefix):
            raise FewlinesError(
                f"schedule: {self.slug} was made for another model: {made}, not {geometry}; "
                "run 'fewlines export-schedule' for it"
            )
        return self.evictions if geometry == made else replace(self.evictions, geometry=geometry)

    def save(self, path: Path) -> None:
        """Write the schedule, a byte or two for each token and head."""
        placed, geometry = self.evictions, self.evictions.geometry
        kind = np.min_scalar_type(geometry.n_tokens)  # unsigned: the steps at which tokens go
        tensors = {name: torch.from_numpy(getattr(placed, name).astype(kind)) for name in TABLES}
        if self.weights is not None:
            tensors["weights"] = self.weights
        header = {"slug": self.slug, "grid": geometry.grid, "prefix": geometry.prefix}
        header |= {"model": self.model} if self.model else {}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> Schedule:
        """Raises if `save` did not write the file."""
        tensors, header = read_tensors(path)
        if not set(TABLES) <= set(tensors):
            raise FewlinesError(f"{path} is not a schedule; 'fewlines export-schedule' writes one")
        capacity, merge_slots, evicted_at = (
            tensors[name].numpy().astype(np.int64) for name in TABLES
        )
        try:
            height, width = header["grid"]
            geometry = Geometry((height, width), header["prefix"], *capacity.shape)
            slug = str(header["slug"])
        except (KeyError, TypeError, ValueError):
            raise FewlinesError(f"{path} does not say which schedule it is") from None
        heads = (geometry.layers, geometry.heads)
        shapes = (capacity.shape, merge_slots.shape, evicted_at.shape)
        if shapes != (heads, heads, (*heads, geometry.n_tokens)):
            raise FewlinesError(f"{path}: tables of {shapes} are no schedule of one model")
        victims = np.full(evicted_at.shape, NO_VICTIM)
        layer, head, token = np.nonzero(evicted_at < geometry.n_tokens)
        victims[layer, head, evicted_at[layer, head, token]] = token
        try:
            plan = EvictionPlan(geometry, capacity, merge_slots, victims)
        except FewlinesError as error:
            raise FewlinesError(f"{path}: {error}") from None
        return cls(slug, plan, tensors.get("weights"), str(header.get("model", "")))


def sample_weights(model: nn.Module) -> Tensor:
    """Take four numbers of every parameter, float32: enough to tell models apart, whatever the
    precision that they are held in."""
    every = [parameter.detach().flatten() for parameter in model.parameters()]
    taken = [each[:: max(1, len(each) // 4)][:4].float() for each in every]
    return torch.cat(taken).cpu()
