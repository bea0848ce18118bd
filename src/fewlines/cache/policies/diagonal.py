"""DiagonalAttn (arXiv 2609.19702): what a head looks at is a set of relative offsets.

The paper finds them in the image itself (`diagonal_online`). Here they are weighed by the mean
attention they got in calibration, and a token is scored by what the offsets still to come will give
it: the schedule (`scheduled`) that is left when the position of the query is forgotten. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewlines.cache.policies.scheduled import Scheduled
from fewlines.cache.policy import CalibratedPolicy
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry, Table


@dataclass(frozen=True)
class Diagonal(CalibratedPolicy):
    """The schedule, from means over equal offsets: what could be transferred to another grid."""

    name: ClassVar[str] = "diagonal"

    def choose_victims(
        self, geometry: Geometry, capacity: Table, calibration: Calibration
    ) -> Table:
        """Choose the victim of each image token."""
        return Scheduled().choose_victims(geometry, capacity, calibration.by_offset)
