"""What a policy is: a rule that says which image token is evicted. It never touches a buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry, Table
from fewlines.registry import discover
from fewlines.schema import Count, check_fields

NO_VICTIM = -1


def _be_anchors(wanted: object) -> object:
    if (type(wanted) is str and wanted == "auto") or (type(wanted) is int and wanted >= 0):
        return wanted
    raise ValueError("write a number of tokens, 0 or more, or auto")


Anchors = Annotated[Any, AfterValidator(_be_anchors)]  # tokens, or auto; see `count_anchors`


class Policy(ABC):
    """A frozen dataclass in `cache/policies/<name>.py`; its fields are its options.

    Attributes:
        name: in configurations and tables.
        calibrated: whether it goes by a calibration of this model.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options that are not what their annotations say."""
        check_fields(self, self.name)

    def __str__(self) -> str:
        """The name, with the options that differ from their defaults: `streaming(sinks=8)`."""
        changed = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)  # type: ignore[arg-type]
            if getattr(self, option.name) != option.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def count_pinned(self, geometry: Geometry, capacity: Table) -> Table:
        """Count the first tokens that heads of these capacities keep, beside a window or a rank."""
        return np.zeros_like(capacity)


def count_anchors(wanted: Anchors, geometry: Geometry, capacity: Table) -> Table:
    """Count the first tokens that are pinned, of any shape of capacities: fewer where not all leave
    capacity for the token that comes.

    `auto` is a line and a half where a line and a token are left beside them, else four: what a
    search found on one training, whose heads look at the first line and, as at sinks, at the first
    tokens of the second. On another it does harm; `experiments/baselines.yaml` searches the number.
    """
    line = geometry.width
    if wanted == "auto":
        wanted = np.where(capacity >= (line + line // 2) + (line + 1), line + line // 2, 4)
    return np.minimum(wanted, capacity - 1)


def evict_one_by_one(
    geometry: Geometry, capacity: Table, choose: Callable[[int, int, int, list[int]], int]
) -> Table:
    """Choose victims as `StaticPolicy.choose_victims` does, for a rule of one victim at a time.

    Args:
        geometry: the image and the model.
        capacity: `(L, H)`, image tokens that each head may hold.
        choose: of layer, head, step and the residents in raster order, the victim.
    """
    victims = np.full((*capacity.shape, geometry.n_tokens), NO_VICTIM)
    for layer, head in np.ndindex(capacity.shape):
        resident: list[int] = []
        for step in range(geometry.n_tokens):
            if len(resident) == capacity[layer, head]:
                victim = choose(layer, head, step, resident)
                victims[layer, head, step] = victim
                resident.remove(victim)
            resident.append(step)
    return victims


class StaticPolicy(Policy):
    """A policy whose victims are the same for every image: known before the first token."""

    @abstractmethod
    def choose_victims(self, geometry: Geometry, capacity: Table) -> Table:
        """Choose the victim of each image token.

        Args:
            geometry: the image and the model.
            capacity: `(L, H)`, how many image tokens each head may hold, that of step `t` included.

        Returns:
            `(L, H, N)`, for each step the position of a resident image token, or `NO_VICTIM`.
        """


class CalibratedPolicy(Policy):
    """A static policy that was shown, once, where each head of this model looks."""

    calibrated: ClassVar[bool] = True

    @abstractmethod
    def choose_victims(
        self, geometry: Geometry, capacity: Table, calibration: Calibration
    ) -> Table:
        """Choose as `StaticPolicy` does, given the calibration of this model and grid."""


class OraclePolicy(Policy):
    """A rule that is applied to a finished image: an instrument, for likelihood alone. It may look
    ahead, or let heads hold or read what differs from image to image."""

    @abstractmethod
    def find_evictions(self, attention: Tensor, capacity: Tensor) -> Tensor:
        """Find when each token is evicted, in one layer.

        Args:
            attention: `(B, H, N, N)`, probability that each image token's query gave to each image
                token under a full cache, mean over the query heads of a key-value head.
            capacity: `(H,)`, how many image tokens each head may hold, the newest included.

        Returns:
            `(B, H, N)`, the step at which each token is evicted; `N` if it never is.
        """

    def find_unread(self, attention: Tensor, capacity: Tensor) -> Tensor | None:
        """Find what stays resident and is not read: `(B, H, N, N)` of queries and tokens; None
        where all residents are read. Arguments are those of `find_evictions`."""
        return None


Need = Literal["line_mean", "line_max", "line_query", "attention", "total"]


NOTHING = torch.empty(0)


@dataclass(frozen=True)
class View:
    """What a scoring policy may look at, once per line, in one layer: the `R` residents of each
    row and head, in raster order, and, of the rest, what it said it needs.

    `A` is the probability that a query gave to a resident, mean over the query heads of a
    key-value head, 0 from queries before the resident was written. A line's queries are those
    since the policy was asked last.

    Attributes:
        step: the image token about to be written.
        geometry: the image and the model.
        capacity: image tokens that each of these heads may hold.
        positions: `(B, H, R)`, the image position of each resident.
        expectation: what calibration expects of these heads; None of policies that need none.
        read_keys, read_values: make `keys` and `values`, which few policies look at.
        line_mean, line_max: `(B, H, R)`, mean and maximum of `A` over the line's queries.
        line_query: `(B, H, r, D)`, the line's mean query of each query head, rotated.
        attention: `(B, H, Q, R)`, `A` of the last `Q ≤ window` queries, oldest first.
        total: `(B, H, R)`, sum of `A` over all queries so far, those before the line times the
            policy's `decay` for every time it was asked since.
    """

    step: int
    geometry: Geometry
    capacity: int
    positions: Tensor
    expectation: Expectation | None
    read_keys: Callable[[], Tensor]
    read_values: Callable[[], Tensor]
    line_mean: Tensor = NOTHING
    line_max: Tensor = NOTHING
    line_query: Tensor = NOTHING
    attention: Tensor = NOTHING
    total: Tensor = NOTHING

    @property
    def keys(self) -> Tensor:
        """`(B, H, R, D)` float32, rotated."""
        return self.read_keys()

    @property
    def values(self) -> Tensor:
        """`(B, H, R, D)` float32."""
        return self.read_values()


@dataclass(frozen=True)
class Expectation:
    """What a calibration says of the `G` heads of a layer that a policy is asked about.

    Attributes:
        attention, future: `(G, N, N)` float32, as in `Calibration`.
    """

    attention: Tensor
    future: Tensor

    def sum_future(self, positions: Tensor, steps: range) -> Tensor:
        """Sum the attention `(B, G, S, R)` that tokens at `positions` `(B, G, R)` can expect of
        all queries from each of the `S` steps on."""
        score = self.future[:, steps.start : steps.stop].expand(len(positions), -1, -1, -1)
        return score.gather(-1, positions[:, :, None].expand(-1, -1, len(steps), -1))

    def average_line(self, view: View, queries: int) -> Tensor:
        """Average the attention `(B, G, R)` expected of the last `queries` queries."""
        rows = self.attention[:, max(0, view.step - queries) : view.step]
        return rows.mean(1).expand(len(view.positions), -1, -1).gather(-1, view.positions)


@dataclass(frozen=True)
class ScoringPolicy(Policy):
    """A policy that judges the residents of every row and head while the image is drawn.

    It is asked once per line, before the line's first token is written; the lowest scores are then
    evicted one by one as the line's tokens come.

    Attributes:
        needs: what the view must offer beside positions, keys and values.
        calibrated: whether the view offers an `expectation`.
        window: how many queries of `attention`; at most a line.
        decay: what is left of `total` from one ranking to the next.
        every: an option of every policy that scores: it is asked again after so many tokens; 0,
            and where fewer fit, is a line.
    """

    needs: ClassVar[Need | None] = None
    window = 1
    decay = 1.0
    every: Count = 0

    def interval(self, geometry: Geometry, capacity: int) -> int:
        """Tokens from one ranking to the next, of a head that holds `capacity`: no more than may
        be evicted, so that what is pinned is retained."""
        free = capacity - int(self.count_pinned(geometry, np.array(capacity)))
        return min(self.every or geometry.width, geometry.width, free)

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Score each resident, `(B, H, R)`: higher is retained, `inf` is pinned. Of equal scores
        the older token is evicted first."""

    def rank_evictions(self, view: View, steps: range, n_evicted: int) -> Tensor:
        """Rank the victims of the line that begins at `steps.start`: one for each of its last
        `n_evicted` steps.

        Args:
            view: the residents, in raster order.
            steps: image tokens of the line, or of the part of it that fits.
            n_evicted: how many victims are asked for.

        Returns:
            `(B, H, n_evicted)`, indices of residents in the order of eviction.
        """
        return comparable(self.score(view)).argsort(stable=True, dim=-1)[..., :n_evicted]


class LookaheadPolicy(ScoringPolicy):
    """A scoring policy that can score tokens before they are drawn, step by step: a line's own
    tokens may be evicted within it, as they must where a head has capacity for little more."""

    @abstractmethod
    def score_ahead(self, view: View, steps: range) -> Tensor:
        """Score each resident, and then each token of `steps`, at each of the `S` steps:
        `(B, H, S, R + S)`. Of equal scores the older token is evicted first."""

    def score(self, view: View) -> Tensor:
        """Score the residents at the next step."""
        resident = view.positions.shape[-1]
        return self.score_ahead(view, range(view.step, view.step + 1))[..., 0, :resident]

    def rank_evictions(self, view: View, steps: range, n_evicted: int) -> Tensor:
        """As `ScoringPolicy.rank_evictions`; from `R` on, indices are of the line's own tokens."""
        score = comparable(self.score_ahead(view, steps))  # (B, H, S, R + S)
        resident = score.shape[-1] - len(steps)
        evicted = torch.zeros_like(score[..., 0, :])
        evictions = []
        for step in range(len(steps) - n_evicted, len(steps)):
            present = (score[..., step, :] + evicted)[..., : resident + step]
            evictions.append(present.argmin(-1, keepdim=True))
            evicted = evicted.scatter(-1, evictions[-1], torch.inf)
        return torch.cat(evictions, dim=-1)


def comparable(score: Tensor) -> Tensor:
    """Scores to 12 bits, so that the rounding of a sum never decides between equals: the keys of
    equal codes have equal norms, but for their last bit."""
    mantissa, exponent = torch.frexp(score.float())
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


def list_policies() -> dict[str, type[Policy]]:
    """List every policy by its name: the files of `fewlines.cache.policies`, one class in each, and
    the entry points of that name of other packages."""
    return discover(Policy, "fewlines.cache.policies")
