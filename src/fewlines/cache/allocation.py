"""What a budget allocation is: a rule that divides a total over layers and heads, the same for
every image."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewlines.cache.policy import Policy
from fewlines.calibration.data import Calibration
from fewlines.calibration.losses import SMALLEST
from fewlines.errors import look_up
from fewlines.geometry import Geometry, Table
from fewlines.registry import discover

NOTHING = 1e-6  # nats/token: below it, a measured loss is noise

Losses = npt.NDArray[np.float64]

Requirement = Literal["", "attention", "losses", "band losses"]


@dataclass(frozen=True)
class Total:
    """What is divided.

    Attributes:
        policy: picks the victims.
        geometry: the image and the model.
        tokens: that all heads may hold together, beside a merge slot each.
        merge: whether victims are merged.
        known: the calibration of this model and grid, if the rule `requires` one.
    """

    policy: Policy
    geometry: Geometry
    tokens: int
    merge: bool
    known: Calibration | None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return self.geometry.layers, self.geometry.heads

    @property
    def calibration(self) -> Calibration:
        """The calibration, of a rule that requires one."""
        assert self.known is not None
        return self.known

    def add_merge_slots(self, capacity: Table) -> tuple[Table, Table]:
        """Add one merge slot to each head where victims are merged."""
        return capacity, np.full_like(capacity, int(self.merge))


class Allocation(ABC):
    """A rule in `cache/allocations/<name>.py`.

    Attributes:
        name: what configurations write.
        label: what tables write behind the policy; nothing for the uniform one.
        requires: what of a calibration it goes by.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    requires: ClassVar[Requirement] = ""

    def check(self, policy: Policy, merge: bool) -> None:  # noqa: B027
        """Check that the rule makes sense for a policy.

        Args:
            policy: picks the victims.
            merge: whether they are merged.

        Raises:
            FewlinesError: it does not.
        """

    @abstractmethod
    def allocate(self, total: Total) -> tuple[Table, Table]:
        """Divide a total.

        Args:
            total: what is divided.

        Returns:
            How many tokens each head may hold, and how many merge slots it has, both `(L, H)`.
        """


def get_allocation(name: str) -> Allocation:
    """Give the allocation of this name.

    Raises:
        FewlinesError: there is none; with those that exist.
    """
    return look_up(name, list_allocations(), "allocation")()


def list_allocations() -> dict[str, type[Allocation]]:
    """List every allocation by its name, found as policies are."""
    return discover(Allocation, "fewlines.cache.allocations")


def interpolate_losses(capacities: Table, loss: Losses, geometry: Geometry) -> Losses:
    """Losses `(L, H, R)` measured at some capacities → at each from `SMALLEST` to a whole image:
    between two they fall as a power."""
    every = np.log(np.arange(SMALLEST, geometry.n_tokens + 1))
    measured = np.log(loss.clip(min=NOTHING))
    between = partial(np.interp, every, np.log(capacities))
    losses: Losses = np.exp(np.apply_along_axis(between, -1, measured))
    return losses


def minimise_losses(losses: Losses, total: int) -> Table:
    """Find the capacities `(L, H)`, `total` in all, of the smallest sum of `losses` `(L, H, ·)`,
    which begin at `SMALLEST`.

    Tokens go one by one to the head whose curve falls most steeply, each curve replaced by its
    convex hull from below, on which this greedy choice is the optimum.
    """
    gains = -np.diff(np.apply_along_axis(find_hull, -1, losses), axis=-1)
    capacity = np.full(losses.shape[:2], SMALLEST)
    heads = list(np.ndindex(capacity.shape))
    queue = [(-gains[head][0], head) for head in heads]
    heapq.heapify(queue)
    for _ in range(total - SMALLEST * len(heads)):
        _, head = heapq.heappop(queue)
        capacity[head] += 1
        given = capacity[head] - SMALLEST
        if given < gains.shape[-1]:
            heapq.heappush(queue, (-gains[head][given], head))
    return capacity


def find_hull(curve: Losses) -> Losses:
    """Find the largest convex function below a curve at 0, 1, 2, …"""
    corners: list[int] = []
    for x in range(len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (x - a) < (curve[x] - curve[a]) * (b - a):
                break
            corners.pop()
        corners.append(x)
    return np.interp(np.arange(len(curve)), corners, curve[corners])
