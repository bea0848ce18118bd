"""A scoring policy's cache in one parallel forward: teacher-forced, line by line inside a layer.

Victims are ranked once per line, so the tokens of a line need no loop: with the order of the
victims fixed at the line's start, each query's residents and summary are known. Exactly the
distribution that decoding under the same `Placement` has, in `N / w` products a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.cache.geometry import Geometry
from fewlines.cache.placement import Placement
from fewlines.cache.policy import Expectation, ScoringPolicy, comparable
from fewlines.cache.teacher import TeacherForced


def attention_under(placement: Placement) -> LineParallel | TeacherForced:
    """The parallel forward's attention under a cache, whatever its policy: for likelihood and for
    training. Policies of hindsight have none."""
    return LineParallel(placement) if placement.scoring is not None else TeacherForced(placement)


class LineParallel:
    """Attention over the prefix and all image tokens but the last, as the policy limits it."""

    def __init__(self, placement: Placement) -> None:
        assert placement.scoring is not None
        self.placement, self.policy = placement, placement.scoring

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, H·r, T, D)` → `(B, H·r, T, D)`."""
        q = q.unflatten(1, (k.shape[1], -1))  # (B, H, r, T, D)
        out = torch.empty_like(q)
        rooms = self.placement.room[layer]
        for room in np.unique(rooms).tolist():
            heads = np.flatnonzero(rooms == room).tolist()
            lines = _Lines(self.placement, self.policy, layer, heads, room)
            out[:, heads] = lines.attend(q[:, heads], k[:, heads], v[:, heads])
        return out.flatten(1, 2)


class _Lines:
    """The `G` heads of a layer that have room for equally many tokens."""

    def __init__(
        self,
        placement: Placement,
        policy: ScoringPolicy,
        layer: int,
        heads: list[int],
        room: int,
    ) -> None:
        self.geometry, self.fold, self.policy = placement.geometry, placement.fold, policy
        self.expectation = placement.expectation(layer, heads)
        self.room = room
        self.window = min(policy.window, self.geometry.width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, G, r, T, D)` → `(B, G, r, T, D)`."""
        B, G = k.shape[:2]
        P, n = self.geometry.prefix, k.shape[2] - self.geometry.prefix
        prefix_k, prefix_v = (x[:, :, None, :P].expand(-1, -1, q.shape[2], -1, -1) for x in (k, v))
        out = [F.scaled_dot_product_attention(q[..., :P, :], prefix_k, prefix_v, is_causal=True)]
        residents = torch.empty(B, G, 0, dtype=torch.long)
        line, total = torch.zeros(B, G, 0, 0), torch.zeros(B, G, 0)
        history = line
        sums = [torch.zeros(B, G, 1, k.shape[-1], dtype=k.dtype) for _ in (k, v)]  # of the victims
        every = min(self.geometry.width, self.room)
        for start in range(0, n, every):
            stop = min(start + every, n)
            first = max(start, self.room)  # the first step at which somebody goes
            going = max(0, stop - first)
            order = torch.arange(residents.shape[-1]).expand_as(residents)
            if going:
                queries = q[..., P + start - every : P + start, :].float()
                view = LineView(
                    start,
                    self.geometry,
                    residents,
                    _pick(k, residents + P).detach().float(),
                    line,
                    queries,
                    history,
                    total,
                    self.expectation,
                )
                with torch.no_grad():
                    order = comparable(self.policy.score(view)).argsort(stable=True, dim=-1)
            # Residents in the order they go, the victims first; then the line's own tokens.
            residents = residents.gather(-1, order)
            rows = torch.cat([residents, torch.arange(start, stop).expand(B, G, -1)], dim=-1) + P
            step = torch.arange(start, stop)[:, None]
            leaves = first + torch.arange(going)
            sees = torch.cat(
                [
                    torch.ones(stop - start, P, dtype=torch.bool),
                    leaves > step,
                    torch.ones(stop - start, residents.shape[-1] - going, dtype=torch.bool),
                    torch.ones(stop - start, stop - start, dtype=torch.bool).tril(),
                ],
                dim=1,
            )  # (c, P + R + c)
            keys, values = (torch.cat([x[:, :, :P], _pick(x, rows)], dim=2) for x in (k, v))
            asked = q[..., P + start : P + stop, :] * q.shape[-1] ** -0.5  # (B, G, r, c, D)
            scores = (asked @ keys[:, :, None].transpose(-1, -2)).masked_fill(~sees, -torch.inf)
            if self.fold and going:
                # Before each query: the sums of all victims so far, (B, G, c, D).
                folded = (step >= leaves).to(k.dtype)  # (c, V)
                victims = slice(P, P + going)
                sums = [
                    total_[:, :, -1:] + folded @ x[:, :, victims]
                    for total_, x in zip(sums, (keys, values), strict=True)
                ]
                count = (first - self.room + folded.sum(1))[:, None]  # (c, 1)
                mean_k, mean_v = (x / count.clamp(min=1) for x in sums)
                summary = (asked * mean_k[:, :, None]).sum(-1, keepdim=True) + count.log()
                weights = torch.cat([scores, summary], dim=-1).softmax(-1)
                y = weights[..., :-1] @ values[:, :, None] + weights[..., -1:] * mean_v[:, :, None]
                weights = weights[..., :-1]
            else:
                weights = scores.softmax(-1)
                y = weights @ values[:, :, None]
            out.append(y)
            # On to the next line: who is left, in raster order, and what was seen of them.
            stay = rows[..., going:] - P
            residents, back = stay.sort(-1)
            line = (
                weights.detach()
                .float()
                .mean(2)[..., P + going :]
                .gather(-1, back[:, :, None].expand(-1, -1, stop - start, -1))
            )
            older = order[..., going:]
            total = F.pad(total.gather(-1, older), (0, stop - start)).gather(-1, back)
            total = total + line.sum(2)
            history = self._history(history, older, back, line)
        return torch.cat(out, dim=-2)

    def _history(self, history: Tensor, older: Tensor, back: Tensor, line: Tensor) -> Tensor:
        """Attention of the last `window` queries on the residents, `(B, G, Q, R)`."""
        if line.shape[2] >= self.window:
            return line[:, :, -self.window :]
        queries = history.shape[2]
        kept = history.gather(-1, older[:, :, None].expand(-1, -1, queries, -1))
        kept = F.pad(kept, (0, line.shape[2]))
        kept = kept.gather(-1, back[:, :, None].expand(-1, -1, queries, -1))
        return torch.cat([kept, line], dim=2)[:, :, -self.window :]


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `(B, G, R)` of `(B, G, T, D)`."""
    return x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[-1]))


@dataclass(frozen=True)
class LineView:
    """What the policy sees at the start of a line: a `View`."""

    step: int
    geometry: Geometry
    positions: Tensor
    keys: Tensor
    line: Tensor  # (B, G, Q, R)
    queries: Tensor  # (B, G, r, Q, D)
    attention: Tensor
    total: Tensor
    expectation: Expectation | None

    @cached_property
    def line_mean(self) -> Tensor:
        return self.line.mean(2)

    @cached_property
    def line_max(self) -> Tensor:
        return self.line.amax(2)

    @cached_property
    def line_query(self) -> Tensor:
        return self.queries.mean(-2)
