"""DiagonalAttn (arXiv 2609.19702): what a head looks at is a set of relative offsets.

The paper keeps a fixed set of offsets, measured once. Here the offsets are weighed by the mean
attention they got, and a token is worth what the offsets still to come will give it: the schedule
(`scheduled`) that is left when the position of the query is forgotten. Our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policies.scheduled import Scheduled
from fewlines.cache.policy import CalibratedPolicy


@dataclass(frozen=True)
class Diagonal(CalibratedPolicy):
    """The schedule, from means over equal offsets: what could be carried to another grid."""

    name: ClassVar[str] = "diagonal"

    def victims(self, geometry: Geometry, room: Table, calibration: Calibration) -> Table:
        return Scheduled().victims(geometry, room, calibration.by_offset)
