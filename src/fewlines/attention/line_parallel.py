"""A scoring policy's cache in one parallel forward: teacher-forced, line by line inside a layer.

Victims are ranked once per line, so the tokens of a line need no loop: with the order of the
victims fixed at the line's start, each query's residents and merge slot are known. Exactly the
distribution that decoding under the same `EvictionPlan` has, in `N / w` products a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines.attention.teacher_forced import TeacherForced, pick_rows
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.policy import ScoringPolicy, View


def attend_under(
    plan: EvictionPlan, device: torch.device | str = "cpu"
) -> LineParallel | TeacherForced:
    """Make the attention of the parallel forward under a cache, whatever its policy: for likelihood
    and for training. Oracles have none.

    Args:
        plan: the evictions.
        device: where queries, keys and values will lie.
    """
    if plan.scoring is not None:
        return LineParallel(plan)
    return TeacherForced(plan, device=device)


class LineParallel:
    """Attention over the prefix and all image tokens but the last, as the policy limits it."""

    def __init__(self, plan: EvictionPlan) -> None:
        assert plan.scoring is not None
        self.plan, self.policy = plan, plan.scoring

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, H·r, T, D)` → `(B, H·r, T, D)`."""
        if q.device.type == "cpu":
            return self._attend(layer, q, k, v)
        with q.device:  # where indices and masks are made
            return self._attend(layer, q, k, v)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (k.shape[1], -1))  # (B, H, r, T, D)
        out = torch.empty_like(q)
        capacities = self.plan.capacity[layer]
        for capacity in np.unique(capacities).tolist():
            heads = np.flatnonzero(capacities == capacity).tolist()
            lines = _Lines(self.plan, self.policy, layer, heads, capacity, q.device)
            out[:, heads] = lines.attend(q[:, heads], k[:, heads], v[:, heads])
        return out.flatten(1, 2)


class _Lines:
    """The `G` heads of a layer that have capacity for equally many tokens."""

    def __init__(
        self,
        plan: EvictionPlan,
        policy: ScoringPolicy,
        layer: int,
        heads: list[int],
        capacity: int,
        device: torch.device,
    ) -> None:
        self.geometry, self.policy = plan.geometry, policy
        self.merges = int(plan.merge_slots[layer, heads[0]]) > 0
        self.expectation = plan.get_expectation(layer, heads, device)
        self.capacity = capacity
        self.window = min(policy.window, self.geometry.width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `(B, G, r, T, D)` → `(B, G, r, T, D)`."""
        P, n = self.geometry.prefix, k.shape[2] - self.geometry.prefix
        prefix_k, prefix_v = (x[:, :, None, :P].expand(-1, -1, q.shape[2], -1, -1) for x in (k, v))
        out = [F.scaled_dot_product_attention(q[..., :P, :], prefix_k, prefix_v, is_causal=True)]
        state = _State.empty(k)
        every = self.policy.interval(self.geometry, self.capacity)
        for start in range(0, n, every):
            y, state = self._line(q, k, v, start, min(start + every, n), state)
            out.append(y)
        return torch.cat(out, dim=-2)

    def _line(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, state: _State
    ) -> tuple[Tensor, _State]:
        """The output `(B, G, r, c, D)` of tokens `start … stop−1`, and what is left after them."""
        P = self.geometry.prefix
        first = max(start, self.capacity)  # the first step that evicts
        n_evicted = max(0, stop - first)
        order = self._order(q, k, v, range(start, stop), n_evicted, state)
        own = torch.arange(start, stop)
        # The victims in the order of eviction, then the retained in raster order: (B, G, R + c).
        old = state.residents
        rows = torch.cat([old, own.expand(*old.shape[:2], -1)], dim=-1).gather(-1, order)
        keys, values = (torch.cat([x[:, :, :P], pick_rows(x, rows + P)], dim=2) for x in (k, v))
        written_at = F.pad(torch.where(order < old.shape[-1], -1, rows), (P, 0), value=-1)
        evicted_at = torch.full((written_at.shape[-1],), stop)
        evicted_at[P : P + n_evicted] = first + torch.arange(n_evicted)
        # What each of the line's queries sees: (B, G, c, P + R + c).
        sees = (written_at[:, :, None] <= own[:, None]) & (own[:, None] < evicted_at)
        asked = q[..., P + start : P + stop, :] * q.shape[-1] ** -0.5  # (B, G, r, c, D)
        scores = asked @ keys[:, :, None].transpose(-1, -2)
        scores = scores.masked_fill(~sees[:, :, None], -torch.inf)
        sums = state.sums
        if self.merges and n_evicted:
            # Before each query: the sums of all victims so far, (B, G, c, D).
            exact = sums[0].dtype
            merged = (own[:, None] >= evicted_at[P : P + n_evicted]).to(exact)  # (c, V)
            with torch.autocast(k.device.type, enabled=False):  # sums of up to N vectors
                sums = tuple(
                    before[:, :, -1:] + merged @ x[:, :, P : P + n_evicted].to(exact)
                    for before, x in zip(sums, (keys, values), strict=True)
                )
            count = (first - self.capacity + merged.sum(1))[:, None]  # (c, 1)
            mean_k, mean_v = ((x / count.clamp(min=1)).to(k.dtype) for x in sums)
            slot = (asked * mean_k[:, :, None]).sum(-1, keepdim=True) + count.log()
            weights = torch.cat([scores, slot], dim=-1).softmax(-1)
            y = weights[..., :-1] @ values[:, :, None] + weights[..., -1:] * mean_v[:, :, None]
        else:
            weights = scores.softmax(-1)
            y = weights @ values[:, :, None]
        seen = weights.detach().float().mean(2)[..., P + n_evicted : P + rows.shape[-1]]
        return y, self._after(state, rows[..., n_evicted:], order[..., n_evicted:], seen, sums)

    def _order(
        self, q: Tensor, k: Tensor, v: Tensor, steps: range, n_evicted: int, state: _State
    ) -> Tensor:
        """Indices of the residents and of the line's own tokens, `(B, G, R + c)`: the
        `n_evicted` that the policy evicts, in that order, and then the retained."""
        everyone = torch.arange(state.residents.shape[-1] + len(steps))
        everyone = everyone.expand(*state.residents.shape[:2], -1)
        if not n_evicted:
            return everyone
        P, every = self.geometry.prefix, self.policy.interval(self.geometry, self.capacity)
        start = steps.start
        asked: dict[str, Tensor] = {}
        match self.policy.needs:
            case "line_mean":
                asked["line_mean"] = state.line.mean(2)
            case "line_max":
                asked["line_max"] = state.line.amax(2)
            case "line_query":
                queries = q[..., P + start - every : P + start, :].detach().float()
                asked["line_query"] = queries.mean(-2)
            case "attention":
                asked["attention"] = state.history
            case "total":
                asked["total"] = state.total
        view = View(
            start,
            self.geometry,
            self.capacity,
            state.residents,
            self.expectation,
            lambda: pick_rows(k, state.residents + P).detach().float(),
            lambda: pick_rows(v, state.residents + P).detach().float(),
            **asked,
        )
        with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
            evictions = self.policy.rank_evictions(view, steps, n_evicted)
        evicted = torch.zeros_like(everyone).scatter(-1, evictions, 1)
        return torch.cat(
            [evictions, evicted.argsort(stable=True, dim=-1)[..., :-n_evicted]], dim=-1
        )

    def _after(
        self, state: _State, retained: Tensor, index: Tensor, seen: Tensor, sums: tuple[Tensor, ...]
    ) -> _State:
        """What is left after a line: tokens `retained`, which `index` among former residents and
        the line's own, and what the line's queries gave them, `seen` `(B, G, c, R)`."""
        own = seen.shape[2]

        def carry_over(x: Tensor) -> Tensor:
            return F.pad(x, (0, own)).gather(-1, index[:, :, None].expand(-1, -1, x.shape[2], -1))

        total = self.policy.decay * carry_over(state.total[:, :, None])[:, :, 0] + seen.sum(2)
        history = torch.cat([carry_over(state.history), seen], dim=2)[:, :, -self.window :]
        return _State(retained, seen, history, total, sums)


@dataclass(frozen=True)
class _State:
    """Between lines: the residents in raster order, what the last line's queries, the last `window`
    ones and all of them gave to each, and the sums of the victims' keys and values."""

    residents: Tensor  # (B, G, R)
    line: Tensor  # (B, G, Q, R)
    history: Tensor  # (B, G, Q, R)
    total: Tensor  # (B, G, R)
    sums: tuple[Tensor, ...]  # (B, G, ·, D), the last row counts

    @classmethod
    def empty(cls, k: Tensor) -> _State:
        B, G, _, D = k.shape
        nothing = torch.zeros(B, G, 0, 0)
        exact = torch.promote_types(k.dtype, torch.float32)
        sums = tuple(torch.zeros(B, G, 1, D, dtype=exact) for _ in range(2))
        residents = torch.empty(B, G, 0, dtype=torch.long)
        return cls(residents, nothing, nothing, torch.zeros(B, G, 0), sums)
