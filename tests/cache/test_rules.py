"""What each policy's rule is, stated again from the papers' words and worked out token by token:
nothing here is a policy's own code, so a rule that changed by itself is seen."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fewlines
from fewlines.cache.policies.streaming import Streaming
from fewlines.cache.policy import Expectation, comparable, count_anchors, list_policies
from fewlines.cache.spec import make_policy
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry

GRID = (5, 6)
N, WIDTH = 30, 6
GEOMETRY = Geometry(GRID, prefix=1, layers=2, heads=2)
CAPACITY = 13
RANDOM = np.random.default_rng(0)


def simulate(choose, capacity: int) -> list[int | None]:
    """Whom each step evicts, by a rule that is told the residents, oldest first, and the step."""
    resident: list[int] = []
    evicted: list[int | None] = []
    for step in range(N):
        victim = choose(resident, step) if len(resident) == capacity else None
        if victim is not None:
            resident.remove(victim)
        evicted.append(victim)
        resident.append(step)
    return evicted


def planned(
    policy: str, calibration: Calibration | None = None, held: int = CAPACITY, **options
) -> np.ndarray:
    """The victim of each step in each head, `(L, H, N)`, as the cache plans it; −1 is none."""
    made = make_policy(policy, options)
    capacity = np.full((2, 2), held)
    known = (calibration,) if calibration else ()
    return made.choose_victims(GEOMETRY, capacity, *known)


def expect(victims: np.ndarray, choose_for_head, held: int = CAPACITY) -> None:
    for layer, head in np.ndindex(2, 2):
        wanted = simulate(choose_for_head(layer, head), held)
        assert victims[layer, head].tolist() == [-1 if x is None else x for x in wanted]


def test_lines_lets_the_oldest_token_go():
    expect(planned("lines"), lambda *_: lambda resident, step: min(resident))


@pytest.mark.parametrize("sinks", [0, 4, 9])
def test_streaming_keeps_the_first_tokens_and_the_latest(sinks):
    """StreamingLLM: attention sinks, and a sliding window."""

    def choose(resident, step):
        return min(token for token in resident if token >= sinks)

    expect(planned("streaming", sinks=sinks), lambda *_: choose)


def test_anchors_are_a_line_and_a_half_where_a_line_and_a_token_are_left():
    geometry = Geometry((14, 14), prefix=1, layers=1, heads=3)
    capacity = np.array([[35, 36, 42]])
    assert count_anchors("auto", geometry, capacity).tolist() == [[4, 21, 21]]
    assert count_anchors(9, geometry, capacity).tolist() == [[9, 9, 9]]
    assert Streaming(sinks="auto").count_pinned(geometry, np.array([[3, 36]])).tolist() == [[2, 21]]


@pytest.mark.parametrize(("held", "columns"), [(7, 1), (8, 1), (13, 1), (15, 2)])
def test_fixed_keeps_its_line_and_the_last_columns_of_the_lines_before(held, columns):
    """The fixed pattern of sparse transformers: as many columns as fit beside a line; where not
    even one does for all lines, the oldest go."""

    def choose(resident, step):
        before = [token for token in resident if token // WIDTH < step // WIDTH]
        plain = [token for token in before if token % WIDTH < WIDTH - columns]
        return min(plain or resident)

    expect(planned("fixed", held=held), lambda *_: choose, held)


def test_fixed_on_two_lines_has_a_column_for_each_token_beside_a_line():
    victims = make_policy("fixed", {}).choose_victims(
        Geometry((2, 6), prefix=1, layers=1, heads=1), np.array([[9]])
    )
    assert victims[0, 0].tolist() == [-1] * 9 + [0, 1, 2]


def test_random_lets_residents_go_that_differ_by_head_and_seed():
    one, again, other = planned("random"), planned("random"), planned("random", seed=1)
    assert (one == again).all()
    assert (one[0, 0] != one[0, 1]).any()
    assert (one != other).any()
    for victims in one.reshape(-1, N):
        resident: set[int] = set()
        for step, victim in enumerate(victims.tolist()):
            assert (victim == -1) == (step < CAPACITY)
            resident -= {victim}
            resident.add(step)
            assert len(resident) <= CAPACITY
        assert len(set(victims[CAPACITY:].tolist())) == N - CAPACITY  # none is evicted twice


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    attention = np.tril(RANDOM.random((2, 2, N, N), np.float32))
    return Calibration(attention / attention.sum(-1, keepdims=True), GRID, images=1)


def test_the_schedule_lets_go_what_all_later_queries_expect_least_of(calibration):
    def of_head(layer, head):
        attention = calibration.attention[layer, head].astype(float)

        def choose(resident, step):
            return min(resident, key=lambda token: attention[step:, token].sum())

        return choose

    expect(planned("scheduled", calibration), of_head)


def test_diagonal_goes_by_the_mean_over_equal_offsets(calibration):
    """Of every query and token as many lines and columns apart; the last token never asks."""

    def of_head(layer, head):
        attention = calibration.attention[layer, head].astype(float)
        seen: dict[tuple[int, int], list[float]] = {}
        for query in range(N - 1):
            for token in range(query + 1):
                offset = (query // WIDTH - token // WIDTH, query % WIDTH - token % WIDTH)
                seen.setdefault(offset, []).append(attention[query, token])
        mean = {offset: np.mean(found) for offset, found in seen.items()}

        def hope(step, token):
            return sum(
                mean.get((query // WIDTH - token // WIDTH, query % WIDTH - token % WIDTH), 0)
                for query in range(step, N - 1)
            )

        return lambda resident, step: min(resident, key=lambda token: hope(step, token))

    expect(planned("diagonal", calibration), of_head)


def test_the_oracle_is_beladys_rule_on_this_image():
    attention = torch.tril(torch.rand(3, 2, N, N, generator=torch.Generator().manual_seed(0)))
    policy = make_policy("oracle", {})
    found = policy.find_evictions(attention, torch.tensor([CAPACITY, CAPACITY]))
    for row, head in np.ndindex(3, 2):
        seen = attention[row, head].double()

        def choose(resident, step, seen=seen):
            return min(resident, key=lambda token: seen[step:, token].sum().item())

        expected = torch.full((N,), N)
        for step, victim in enumerate(simulate(choose, CAPACITY)):
            if victim is not None:
                expected[victim] = step
        assert found[row, head].tolist() == expected.tolist()


def draw_attention(rows: int = 3) -> torch.Tensor:
    """Of queries to tokens, in two heads: the second looks near."""
    random = torch.rand(rows, 2, N, N, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(N)
    random[:, 1] *= torch.exp2(-2.0 * (steps[:, None] - steps).clamp(min=0))
    return torch.tril(random)


@pytest.mark.parametrize("first", [CAPACITY, CAPACITY + 3])
def test_heads_are_typed_early_in_the_image_and_share_what_local_ones_free(first):
    """HeadKV, online: nothing is known before the image is."""
    attention, options = draw_attention(), {"recent": 5 / 13, "sinks": 2, "mass": 0.8, "near": 0.5}
    capacity = torch.tensor([first, CAPACITY])
    found = make_policy("headkv_online", options).find_evictions(attention, capacity)
    for row in range(3):
        needs = []
        for head in range(2):
            by_distance = [0.0] * CAPACITY
            for query in range(CAPACITY - 5, CAPACITY):
                for token in range(query + 1):
                    by_distance[query - token] += float(attention[row, head, query, token])
            reached = np.cumsum(by_distance) / sum(by_distance)
            needs.append(next(r for r in range(1, CAPACITY + 1) if reached[r - 1] >= 0.8))
        assert needs[1] <= 0.5 * CAPACITY <= 0.5 * first < needs[0]  # the second head is local
        holds = [first + CAPACITY - 2 - needs[1], 2 + needs[1]]
        for head in range(2):
            resident, expected = list(range(CAPACITY)), [N] * N
            for step in range(CAPACITY, N):

                def rank(token, step=step, head=head, given=attention[row]):
                    if token < 2:
                        return (2, 0.0)
                    if head == 1 or token >= step - 5:
                        return (1, float(token))
                    return (0, sum(given[head, step - 5 : step, token].tolist()))

                while len(resident) > holds[head] - 1:
                    victim = min(resident, key=rank)
                    resident.remove(victim)
                    expected[victim] = step
                resident.append(step)
            assert found[row, head].tolist() == expected
    alike = draw_attention().roll(1, 1)[:, :1].expand(-1, 2, -1, -1)  # both look near
    found = make_policy("headkv_online", options).find_evictions(alike, capacity[1:].expand(2))
    held = (torch.arange(N)[:, None] < found[..., None, :]).tril().sum(-1)
    assert held.max() == CAPACITY  # with nobody to take what they free, nobody frees


def test_offsets_that_a_window_hardly_looks_at_are_not_read():
    """DiagonalAttn, as others describe it: the skip set moves by one with every step."""
    attention, capacity = draw_attention(), torch.tensor([CAPACITY, 9])
    policy = make_policy("diagonal_online", {"read": 0.4})
    leaves = policy.find_evictions(attention, capacity)
    unread = policy.find_unread(attention, capacity)
    for row, head in np.ndindex(3, 2):
        window = int(capacity[head])
        skipped: set[int] = set()  # positions
        for step in range(N):
            skipped = {token + 1 for token in skipped}
            resident = [k for k in range(step + 1) if k > step - window]
            assert [k for k in range(step + 1) if leaves[row, head, k] > step] == resident
            if step < window and len(resident) - len(skipped) > round(0.4 * window):
                known = [k for k in resident if k not in skipped and 0 < k < step]
                # Whose offset the last query looked at least: it was at the token before.
                skipped.add(min(known, key=lambda k: attention[row, head, step - 1, k - 1].item()))
            read = [k for k in resident if not unread[row, head, step, k]]
            assert read == [k for k in resident if k not in skipped]
            assert len(read) <= round(0.4 * window)
    everything = make_policy("diagonal_online", {"read": 1.0})
    assert not everything.find_unread(attention, capacity).any()


STEP, RESIDENTS = 18, 13  # the fourth line is about to be written


def look(window: int = 6, decay: float = 1.0, calibration: Calibration | None = None):
    """What a policy is shown: residents in raster order, and what queries so far gave to them."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack(
        [torch.randperm(STEP, generator=generator)[:RESIDENTS].sort().values for _ in range(2)]
    )[None]  # (1, 2, R)
    queries = torch.rand(1, 2, STEP, RESIDENTS, generator=generator)  # of all queries so far
    lines = torch.arange(STEP) // WIDTH
    aged = decay ** (lines[-1] - lines).float()
    expectation = None
    if calibration:
        expectation = Expectation(
            torch.from_numpy(calibration.attention[0]),
            torch.from_numpy(calibration.future[0].astype(np.float32)),
        )
    return SimpleNamespace(
        step=STEP,
        geometry=GEOMETRY,
        capacity=2 * WIDTH + WIDTH // 2 + 1,
        positions=positions,
        keys=torch.randn(1, 2, RESIDENTS, 8, generator=generator),
        queries=queries,
        line_mean=queries[:, :, -WIDTH:].mean(2),
        line_max=queries[:, :, -WIDTH:].amax(2),
        line_query=torch.randn(1, 2, 3, 8, generator=generator),
        values=torch.randn(1, 2, RESIDENTS, 8, generator=generator),
        attention=queries[:, :, -window:],
        total=(queries * aged[:, None]).sum(2),
        expectation=expectation,
    )


def check(policy: str, view, rank_by, n_evicted: int = 6, **options) -> None:
    """The victims, in order, against a plain rule: the least by `rank_by(head, index)` first."""
    made = make_policy(policy, options)
    steps = range(STEP, STEP + WIDTH)
    found = made.rank_evictions(view, steps, n_evicted)
    for head in range(2):
        order = sorted(range(RESIDENTS), key=lambda index: rank_by(head, index))
        assert found[0, head].tolist() == order[:n_evicted], policy


def place(view, head: int, index: int) -> int:
    return int(view.positions[0, head, index])


def test_h2o_keeps_the_heavy_hitters_and_the_recent_half():
    view = look()

    def rank_by(head, index):
        token = place(view, head, index)
        recent = token >= STEP - round(RESIDENTS / 2)
        return (recent, token if recent else view.queries[0, head, :, index].sum().item())

    check("h2o", view, rank_by)


def test_tova_goes_by_the_last_query_alone():
    view = look(window=1)
    check("tova", view, lambda head, index: view.queries[0, head, -1, index].item())


def test_snapkv_pools_the_last_window_over_neighbours_and_keeps_the_window():
    window, kernel = 4, 3
    view = look(window=window)

    def rank_by(head, index):
        token = place(view, head, index)
        votes = view.queries[0, head, -window:].mean(0)
        near = range(index - kernel // 2, index + kernel // 2 + 1)
        before = [i for i in near if 0 <= i < RESIDENTS and place(view, head, i) < STEP - window]
        pooled = sum(votes[i].item() for i in before) / kernel
        recent = token >= STEP - window
        return (recent, token if recent else pooled)

    check("snapkv", view, rank_by, window=window, kernel=kernel)


def test_snapkv_keeps_the_oldest_token_of_its_window_though_nobody_looked_at_it():
    view = look(window=4)
    view.positions = torch.arange(STEP - RESIDENTS, STEP).expand(1, 2, -1)
    view.attention = torch.zeros(1, 2, 4, RESIDENTS)
    view.attention[..., : RESIDENTS - 4] = 0.1
    score = make_policy("snapkv", {"window": 4, "kernel": 1}).score(view)
    assert (score[..., -4:] > 1).all()
    assert (score[..., :-4] < 1).all()


def test_what_is_expected_of_a_line_counts_its_first_query(calibration):
    """Also where that is the first of the image."""
    attention = torch.from_numpy(calibration.attention[0])
    expected = Expectation(attention, torch.from_numpy(calibration.future[0].astype(np.float32)))
    view = SimpleNamespace(step=WIDTH, positions=torch.arange(WIDTH).expand(1, 2, -1))
    found = expected.average_line(view, WIDTH)[0]
    torch.testing.assert_close(found, attention[:, :WIDTH].mean(1)[:, :WIDTH])


@pytest.mark.parametrize("sinks", [0, 4, "auto"])
def test_vatp_weighs_attention_by_the_norm_of_the_value_and_pins_the_sinks(sinks):
    view = look()

    def rank_by(head, index):
        token = place(view, head, index)
        if token < (WIDTH + WIDTH // 2 if sinks == "auto" else sinks):
            return (2, token)
        if token >= STEP - round(RESIDENTS / 2):
            return (1, token)
        brought = view.values[0, head, index].abs().sum().item()
        return (0, view.queries[0, head, :, index].sum().item() * brought)

    check("vatp", view, rank_by, sinks=sinks)


def test_rkv_weighs_importance_against_redundancy():
    window, kernel, share = 4, 3, 0.3
    view = look(window=window)

    def cosine(head, one, other):
        keys = view.keys[0, head]
        return float(keys[one] @ keys[other] / keys[one].norm() / keys[other].norm())

    def likeness(head, index):
        """What the others are like it; each forgives the latest that it is like."""
        total = 0.0
        for other in set(range(RESIDENTS)) - {index}:
            alike = [i for i in range(RESIDENTS) if i != other and cosine(head, other, i) > 0.5]
            if not alike or max(alike) != index:
                total += cosine(head, other, index)
        return math.exp(total / RESIDENTS)

    def importance(head, index):
        before = [i for i in range(RESIDENTS) if place(view, head, i) < STEP - window]
        votes = view.queries[0, head, -window:]
        shares = votes / votes[:, before].sum(1, keepdim=True)
        return max(shares[:, i].mean().item() for i in before if abs(i - index) <= kernel // 2)

    def rank_by(head, index):
        token = place(view, head, index)
        if token >= STEP - window:
            return (1, token)
        redundancy = likeness(head, index) / sum(likeness(head, i) for i in range(RESIDENTS))
        return (0, share * importance(head, index) - (1 - share) * redundancy)

    check("rkv", view, rank_by, window=window, kernel=kernel, share=share)


def test_keydiff_keeps_keys_unlike_the_mean_key():
    view = look()

    def rank_by(head, index):
        unit = view.keys[0, head] / view.keys[0, head].norm(dim=-1, keepdim=True)
        mean = unit.mean(0)
        return -float(unit[index] @ mean / mean.norm())

    check("keydiff", view, rank_by)


@pytest.mark.parametrize("anchor", [4, 16, 100])
def test_what_is_pinned_stays_where_a_line_does_not_fit_beside_it(anchor):
    """A line cannot then be decided at once: the policy is asked more often."""
    geometry = Geometry((14, 14), prefix=1, layers=1, heads=1)
    for policy in (make_policy("line_ar", {"anchor": anchor}), make_policy("vatp", {"sinks": 4})):
        for capacity in (2, 14, 28, 42):
            pinned = int(policy.count_pinned(geometry, np.array(capacity)))
            assert 1 <= policy.interval(geometry, capacity) <= min(14, capacity - pinned)


def test_vatp_tells_large_scores_apart():
    """Of hundreds, in wide heads: as well as of small ones."""
    view = look()
    small = make_policy("vatp", {"sinks": 0, "recent": 0}).score(view)
    view.total = view.total * 1e4
    large = make_policy("vatp", {"sinks": 0, "recent": 0}).score(view)
    assert torch.equal(comparable(large).argsort(-1), comparable(small).argsort(-1))
    assert len(comparable(large)[0, 0].unique()) == RESIDENTS


def test_knorm_keeps_keys_of_small_norm():
    view = look()
    check("knorm", view, lambda head, index: -float(view.keys[0, head, index].norm()))


@pytest.mark.parametrize("anchor", [0, 4, 8, "auto"])
@pytest.mark.parametrize("recent", [0, 1, 1.6, 2])
@pytest.mark.parametrize("pool", ["mean", "max", "query", "decayed"])
def test_line_ar_pins_anchors_and_recent_lines_and_judges_the_middle(anchor, recent, pool):
    """LineAR: the first tokens and the last lines stay; of the middle goes what the last line
    looked at least."""
    decay = 0.5
    view = look(decay=decay)

    def judged(head, index):
        last = view.queries[0, head, -WIDTH:, index]
        if pool == "mean":
            return float(last.mean())
        if pool == "max":
            return float(last.max())
        if pool == "decayed":
            by_line = view.queries[0, head, :, index].unflatten(0, (-1, WIDTH)).sum(1)
            return float(sum(total * decay**age for age, total in enumerate(reversed(by_line))))
        scores = view.line_query[0, head] @ view.keys[0, head].T / 8**0.5
        return float(scores.softmax(-1).mean(0)[index])

    def rank_by(head, index):
        token = place(view, head, index)
        if token < (WIDTH + WIDTH // 2 if anchor == "auto" else anchor):
            return (2, token)
        if token >= STEP - round(recent * WIDTH):
            return (1, token)
        return (0, judged(head, index))

    check("line_ar", view, rank_by, anchor=anchor, recent=recent, pool=pool, decay=decay)


def test_corrected_multiplies_the_schedule_by_what_the_line_showed(calibration):
    power, floor = 0.5, 0.01
    view = look(calibration=calibration)
    attention = calibration.attention[0].astype(float)
    policy = make_policy("corrected", {"power": power, "floor": floor})
    steps = range(STEP, STEP + WIDTH)
    found = policy.rank_evictions(view, steps, WIDTH)
    for head in range(2):
        resident = view.positions[0, head].tolist()
        seen = dict(zip(resident, view.line_mean[0, head].tolist(), strict=True))

        def rank_by(token, step, head=head, seen=seen):
            hope = attention[head, step:, token].sum()
            if token not in seen:
                return hope
            usual = attention[head, STEP - WIDTH : STEP, token].mean()
            return hope * ((seen[token] + floor) / (usual + floor)) ** power

        present, order = list(resident), []
        for step in steps:
            victim = min(present, key=lambda token: rank_by(token, step))
            order.append([*resident, *steps].index(victim))
            present.remove(victim)
            present.append(step)
        assert found[0, head].tolist() == order
        score = policy.score_ahead(view, steps)[0, head]
        wanted = [[rank_by(token, step) for token in (*resident, *steps)] for step in steps]
        np.testing.assert_allclose(score, wanted, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(policy.score(view)[0, head], wanted[0][:RESIDENTS], rtol=1e-3)


@pytest.mark.parametrize(
    ("every", "capacity", "asked_after"),
    [(0, 20, 6), (0, 4, 4), (2, 20, 2), (2, 1, 1), (9, 20, 6), (1, 20, 1)],
)
def test_a_policy_is_asked_once_per_line_or_as_often_as_it_says(every, capacity, asked_after):
    assert make_policy("tova", {"every": every}).interval(GEOMETRY, capacity) == asked_after


def test_scores_are_compared_at_twelve_bits():
    close = torch.tensor([1.0, 1 + 2**-15, 1 + 2**-11, -3.0, 0.0])
    assert comparable(close).tolist() == [1.0, 1.0, 1 + 2**-11, -3.0, 0.0]
    assert comparable(torch.tensor([torch.inf])).item() == torch.inf


STATED = {
    "full", "lines", "streaming", "fixed", "random", "scheduled", "diagonal", "oracle",
    "diagonal_online", "headkv_online", "h2o", "tova", "snapkv", "rkv", "keydiff", "knorm", "vatp",
    "line_ar", "corrected",
}  # fmt: skip


def test_every_policy_has_its_rule_stated_here():
    assert set(list_policies()) == STATED


def test_merging_keeps_the_means_of_keys_and_values_and_their_number():
    """KeepKV, ZSMerge: the slot enters the softmax with log n."""
    from fewlines.attention.buffer import BoundedCache

    plan = fewlines.cache("lines", tokens=4, merge=True).plan(Geometry((2, 4), 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 9, 4, generator=generator)
    buffers = BoundedCache(plan, 1, 4)
    rows = [buffers(0, q[:, :, :1], k[:, :, :1], v[:, :, :1])]
    for step in range(8):
        buffers.advance(step)
        at = slice(step + 1, step + 2)
        rows.append(buffers(0, q[:, :, at], k[:, :, at], v[:, :, at]))
        kept = [0, *range(max(0, step - 2), step + 1)]  # three tokens beside the slot
        gone = list(range(1, max(0, step - 2) + 1))
        held = [0, *(token + 1 for token in kept[1:])]
        keys, values = [k[0, 0, i] for i in held], [v[0, 0, i] for i in held]
        bias = [0.0] * len(held)
        if gone:
            keys.append(k[0, 0, gone].mean(0))
            values.append(v[0, 0, gone].mean(0))
            bias.append(float(np.log(len(gone))))
        weights = (q[0, 0, at] @ torch.stack(keys).T / 2 + torch.tensor(bias)).softmax(-1)
        torch.testing.assert_close(rows[-1][0, 0], weights @ torch.stack(values))
