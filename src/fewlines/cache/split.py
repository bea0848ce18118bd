"""How a total is split over layers and heads, the same for every image."""

from __future__ import annotations

import heapq
from functools import partial

import numpy as np
import numpy.typing as npt

from fewlines.cache.calibration import Calibration
from fewlines.cache.geometry import Geometry, Table
from fewlines.cache.policy import NOBODY, CalibratedPolicy
from fewlines.errors import FewlinesError

LOCAL = 0.9  # HeadKV's τ
FLOOR = 0.2  # Ada-KV's α: the share of the uniform room that is everyone's
STEEPNESS = 20  # PyramidKV's β: the top layer gets a β-th of the mean
NOTHING = 1e-6  # nats/token: below it, a measured loss is noise
SMALLEST = 2  # tokens of a head: the one being decoded and one more


def split_by_mass(
    policy: CalibratedPolicy, geometry: Geometry, total: int, calibration: Calibration
) -> Table:
    """Room of each head, `(L, H)`, that loses the least expected attention mass in all: the cheap
    baseline of `split_by_loss`."""
    shape = (geometry.layers, geometry.heads)
    losses = np.stack(
        [
            _lost_mass(policy, geometry, np.full(shape, room), calibration)
            for room in range(SMALLEST, geometry.n_tokens + 1)
        ],
        axis=-1,
    )
    return _cheapest(losses, total)


def split_by_loss(geometry: Geometry, total: int, calibration: Calibration) -> Table:
    """Room of each head, `(L, H)`, that loses the least likelihood in all, as `Curves` were
    measured: losses of single heads are taken to add up, and to fall as a power between rooms."""
    curves = calibration.require_curves()
    return _cheapest(_at_every_room(curves.rooms, curves.loss, geometry), total)


def split_by_summaries(
    geometry: Geometry, total: int, calibration: Calibration
) -> tuple[Table, Table]:
    """As `split_by_loss`, but each head may have several summaries in place of tokens, where that
    was measured to lose less: room for tokens and number of summaries, both `(L, H)`. `total` is
    the room beside one summary each."""
    curves = calibration.require_curves()
    if not curves.of_more:
        raise FewlinesError(
            "cache: this calibration does not say what more summaries would lose; run "
            "'fewlines calibrate-summaries'"
        )
    losses = [_at_every_room(curves.rooms, curves.loss, geometry)]
    for count, loss in curves.of_more.items():
        fewer = count - 1  # tokens, in the same room
        shifted = np.full_like(losses[0], np.inf)
        shifted[..., fewer:] = _at_every_room(curves.rooms, loss, geometry)[..., :-fewer]
        losses.append(shifted)
    stacked = np.stack(losses)  # (counts, L, H, rooms)
    rooms = _cheapest(stacked.min(0), total)
    at_room = np.take_along_axis(stacked, (rooms - SMALLEST)[None, ..., None], -1)[..., 0]
    summaries = np.array([1, *curves.of_more])[at_room.argmin(0)]
    return rooms + 1 - summaries, summaries


def _at_every_room(
    rooms: npt.NDArray[np.int64], loss: npt.NDArray[np.float64], geometry: Geometry
) -> npt.NDArray[np.float64]:
    """Losses `(L, H, R)` measured at some rooms → from `SMALLEST` to a whole image."""
    every = np.log(np.arange(SMALLEST, geometry.n_tokens + 1))
    measured = np.log(loss.clip(min=NOTHING))
    between = partial(np.interp, every, np.log(rooms))
    losses: npt.NDArray[np.float64] = np.exp(np.apply_along_axis(between, -1, measured))
    return losses


def _cheapest(losses: npt.NDArray[np.float64], total: int) -> Table:
    """Room of each head, `total` in all, of the smallest sum of `losses` `(L, H, rooms)`, which
    begin at room `SMALLEST`.

    Tokens go one by one to the head whose curve falls most steeply, each curve replaced by its
    convex hull from below, on which this greedy choice is the optimum.
    """
    gains = -np.diff(np.apply_along_axis(_convex_hull, -1, losses), axis=-1)
    rooms = np.full(losses.shape[:2], SMALLEST)
    heads = list(np.ndindex(rooms.shape))
    queue = [(-gains[head][0], head) for head in heads]
    heapq.heapify(queue)
    for _ in range(total - SMALLEST * len(heads)):
        _, head = heapq.heappop(queue)
        rooms[head] += 1
        given = rooms[head] - SMALLEST
        if given < gains.shape[-1]:
            heapq.heappush(queue, (-gains[head][given], head))
    return rooms


def split_by_depth(geometry: Geometry, total: int) -> Table:
    """Room of each head, `(L, H)`, falling evenly from the first layer to the last, after
    PyramidKV (arXiv 2406.02069); what exceeds an image is given to the layers above."""
    heads, n, layers = geometry.heads, geometry.n_tokens, geometry.layers
    mean = total / (layers * heads)
    low = mean / STEEPNESS
    wanted = np.linspace(2 * mean - low, low, layers) if layers > 1 else np.array([mean])
    rooms = np.clip(wanted.round().astype(int), SMALLEST, n)
    left = total // heads - int(rooms.sum())
    while left > 0:  # rounding and clipping: to the first layer that can take it
        rooms[np.flatnonzero(rooms < n)[0]] += 1
        left -= 1
    while left < 0:  # or from the last that can give it
        rooms[np.flatnonzero(rooms > SMALLEST)[-1]] -= 1
        left += 1
    return np.repeat(rooms[:, None], heads, axis=1)


def split_by_reach(geometry: Geometry, total: int, calibration: Calibration) -> Table:
    """Room of each head, `(L, H)`, after HeadKV (arXiv 2605.20600): a head that finds a share
    `LOCAL` of its attention among its last few tokens, fewer than the uniform room, keeps only so
    many; what it frees goes to the other heads alike."""
    n, shape = geometry.n_tokens, (geometry.layers, geometry.heads)
    uniform = total // (shape[0] * shape[1])
    distance = np.arange(n)[:, None] - np.arange(n)  # (q, k)
    inside = distance >= 0
    mass = np.stack(
        [
            np.bincount(distance[inside], head[inside], minlength=n)
            for head in calibration.attention.reshape(-1, n, n)
        ]
    ).cumsum(1)  # (L·H, reach)
    reach = (mass < LOCAL * mass[:, -1:]).sum(1) + 1
    rooms = np.where(reach < uniform, reach.clip(SMALLEST), 0)
    far = np.flatnonzero(rooms == 0)
    if len(far) == 0:
        return np.full(shape, uniform)
    left = total - int(rooms.sum())
    rooms[far] = left // len(far)
    rooms[far[: left % len(far)]] += 1
    return np.minimum(rooms, n).reshape(shape)


def split_by_joint_rank(geometry: Geometry, total: int, calibration: Calibration) -> Table:
    """Room of each head, `(L, H)`, after Ada-KV (arXiv 2407.11550): of the tokens that a layer's
    heads look at, those looked at most, as many as the layer may hold, are counted by head. Ada-KV
    counts anew for every prompt and pads; here it is the mean over the queries of calibration, the
    same for every image, so that bytes really fall. A floor is everyone's."""
    n, layers, heads = geometry.n_tokens, geometry.layers, geometry.heads
    uniform = total // (layers * heads)
    rooms = np.empty((layers, heads), int)
    for layer, attention in enumerate(calibration.attention.astype(np.float32)):  # (H, q, k)
        held = total // layers + (layer < total % layers)
        found = np.zeros(heads)
        for query in range(uniform, n):  # those that cannot see everything
            seen = attention[:, query, : query + 1].ravel()
            best = np.argpartition(seen, -held)[-held:]
            found += np.bincount(best // (query + 1), minlength=heads)
        wanted = FLOOR * held / heads + (1 - FLOOR) * held * found / found.sum()
        rooms[layer] = _whole(wanted, held, n)
    return rooms


def _whole(wanted: npt.NDArray[np.float64], total: int, most: int) -> npt.NDArray[np.int64]:
    """The nearest whole numbers from `SMALLEST` to `most` of this sum."""
    rooms = wanted.round().astype(int).clip(SMALLEST, most)
    while (over := int(rooms.sum()) - total) != 0:
        step = -1 if over > 0 else 1
        allowed = rooms > SMALLEST if over > 0 else rooms < most
        missing = np.where(allowed, step * (wanted - rooms), -np.inf)
        rooms[missing.argmax()] += step
    return rooms


def _lost_mass(
    policy: CalibratedPolicy, geometry: Geometry, room: Table, calibration: Calibration
) -> npt.NDArray[np.float64]:
    """Expected attention `(L, H)` to tokens that are gone, summed over an image's queries."""
    victims = policy.victims(geometry, room, calibration)
    future = calibration.future  # (L, H, q, k)
    layer, head, step = np.nonzero(victims != NOBODY)
    lost = np.zeros(room.shape)
    np.add.at(lost, (layer, head), future[layer, head, step, victims[layer, head, step]])
    return lost


def _convex_hull(curve: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest convex function below a curve at 0, 1, 2, …"""
    corners: list[int] = []
    for x in range(len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (x - a) < (curve[x] - curve[a]) * (b - a):
                break
            corners.pop()
        corners.append(x)
    return np.interp(np.arange(len(curve)), corners, curve[corners])
