"""What must hold of every family, whatever its network: it predicts from what came before, its
probabilities sum to one, and drawing with its state is drawing the naive way."""

from __future__ import annotations

import itertools

import pytest
import torch

import fewlines
from fewlines.decode.loop import decode, generate
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.metrics.likelihood import predict_by_steps
from fewlines.models.base import Model, TokenSpec, get_family

SIZES = {
    "pixelcnn": {"channels": 16, "layers": 3, "kernel": 3},
    "pixelcnn 5": {"channels": 16, "layers": 2, "kernel": 5},
    "pixelrnn": {"variant": "row", "hidden": 8, "layers": 2},
    "pixelrnn 5": {"variant": "row", "hidden": 8, "layers": 2, "kernel": 5},
    "gated-deltanet": {"dim": 8, "layers": 2, "heads": 2, "chunk": 5},
    "gated-deltanet whole": {"dim": 8, "layers": 2, "heads": 2, "chunk": 64},
    "sparse-transformer": {"pattern": "strided", "dim": 24, "layers": 2, "heads": 3},
    "sparse-transformer fixed": {
        "pattern": "fixed",
        "dim": 24,
        "layers": 2,
        "heads": 3,
        "summary": 2,
    },
    "hierarchical": {"dim": 8, "coarse_layers": 1, "layers": 2, "heads": 2, "lines": 1},
    "pixelrnn diagonal": {"variant": "diagonal", "hidden": 8, "layers": 2},
}
GRIDS = [(1, 1), (1, 4), (4, 1), (2, 3), (5, 4)]
FULL = fewlines.cache("full")


def make(name: str, grid: tuple[int, int] = (4, 5), codes: int = 7) -> Model:
    family = get_family(name.split()[0])
    settings = family.Settings(family=family.name, **SIZES[name])
    model = family(settings.make_shape(TokenSpec(grid, codes, 3))).double()
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    for parameter in model.parameters():  # what begins at zero too
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.requires_grad_(False)


def draw_codes(model: Model, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.spec.codes, (rows, model.spec.n_tokens), generator=generator)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_a_prediction_depends_on_all_that_came_before_and_on_nothing_else(name, grid):
    model = make(name, grid)
    (codes,) = draw_codes(model, 1)
    labels = torch.zeros(1, dtype=torch.long)
    before = model.teacher_forced(labels, codes[None])
    for step, token in enumerate(model.order):
        changed = codes.clone()
        changed[token] = (codes[token] + 1) % model.spec.codes
        after = model.teacher_forced(labels, changed[None])
        moved = ((after - before).abs().amax((0, 2)) > 0)[model.order]
        assert not moved[: step + 1].any()
        if step + 1 < len(codes):
            assert moved[step + 1 :].any()


@pytest.mark.parametrize(
    "name", ["pixelcnn", "pixelrnn diagonal", "gated-deltanet", "hierarchical"]
)
def test_the_last_prediction_depends_on_every_token_within_reach(name):
    """No blind spot: of few lines, since a layer of these sizes sees one up."""
    model = make(name, (3, 4))
    (codes,) = draw_codes(model, 1)
    labels = torch.zeros(1, dtype=torch.long)
    before = model.teacher_forced(labels, codes[None])[0, model.order[-1]]
    for token in model.order[:-1]:
        changed = codes.clone()
        changed[token] = (codes[token] + 1) % model.spec.codes
        after = model.teacher_forced(labels, changed[None])[0, model.order[-1]]
        assert (after - before).abs().max() > 0, int(token)


@pytest.mark.parametrize("name", SIZES)
def test_the_class_changes_every_prediction(name):
    model = make(name)
    codes = draw_codes(model, 1).expand(2, -1)
    one, other = model.teacher_forced(torch.tensor([0, 3]), codes)
    assert ((one - other).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("name", SIZES)
def test_the_probabilities_of_all_images_sum_to_one(name):
    model = make(name, (2, 3), codes=3)
    images = torch.tensor(list(itertools.product(range(3), repeat=6)))
    logits = model.teacher_forced(torch.ones(len(images), dtype=torch.long), images)
    nll = -logits.log_softmax(-1).gather(-1, images[..., None]).sum((1, 2))
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_its_state_predicts_what_the_whole_image_predicts(name, grid):
    model = make(name, grid)
    labels, codes = torch.tensor([0, 3]), draw_codes(model, 2)
    by_steps = predict_by_steps(model, labels, codes, FULL, torch.float64)
    torch.testing.assert_close(by_steps, model.teacher_forced(labels, codes), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_drawing_with_its_state_is_drawing_the_naive_way(name):
    model = make(name)
    labels, noise = torch.tensor([0, 1, 2, 3]), draw_noise(0, range(4), model.spec.n_tokens)
    engines = type(model).engines
    assert engines[0] == "lean"
    drawn = [decode(model, labels, noise, FULL, Sampler(), engine=engine) for engine in engines]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("name", SIZES)
def test_an_image_is_the_same_in_every_batch(name):
    model = make(name)
    labels = torch.arange(5) % 3
    whole = generate(model, labels, FULL, seed=2, batch=5)
    assert torch.equal(generate(model, labels, FULL, seed=2, batch=2), whole)
    assert torch.equal(generate(model, labels[3:], FULL, seed=2, first=3, batch=2), whole[3:])


BYTES = {  # of an image of 4×5 tokens in float64
    "pixelcnn": 8 * (3 * 16 * (5 * 1 + 2 * 5 + 1) + 16 * 5),
    "pixelcnn 5": 8 * (2 * 16 * (5 * 2 + 2 * 5 + 2) + 16 * 5),
    "pixelrnn": 8 * (2 * (2 * 5 * 8 + 8 + 16) + 6 * 16 + 16),
    "pixelrnn 5": 8 * (2 * (2 * 5 * 8 + 2 * 8 + 2 * 16) + 7 * 16 + 2 * 16),
    "gated-deltanet": 8 * 2 * (2 * 4 * 4 + 3 * 3 * 8),
    "gated-deltanet whole": 8 * 2 * (2 * 4 * 4 + 3 * 3 * 8),
    "sparse-transformer": 8 * 2 * 2 * 8 * (3 + 2 * 5 + 1 * 4 * 5),
    "sparse-transformer fixed": 8 * 2 * 2 * 8 * (3 + 2 * 5 + 1 * 4 * 2),
    "hierarchical": 8 * (2 * 8 * 2 * (1 + 5) + 7 * 8 + 6),
    "pixelrnn diagonal": 8 * (2 * (2 * (5 * 8 + 8) + 5 * 16) + 6 * 16 + 16),
}


READ = {  # by a token of it, the mean
    "pixelcnn": 8 * (3 * 16 * (1 + 2 + 1) + 16),
    "pixelcnn 5": 8 * (2 * 16 * (2 + 2 + 2) + 16),
    "pixelrnn": 8 * (2 * (3 * 8 + 8 + 16) + 4 * 16),
    "pixelrnn 5": 8 * (2 * (5 * 8 + 8 + 2 * 16) + 7 * 16),
    "pixelrnn diagonal": 8 * (2 * (3 * 8 + 8 + 3 * 8 + 16) + 4 * 16),
    "gated-deltanet": BYTES["gated-deltanet"],
    "gated-deltanet whole": BYTES["gated-deltanet"],
    "sparse-transformer": 8 * 2 * 2 * 8 * (2 * 105 + 66) / 20,
    "sparse-transformer fixed": 8 * 2 * 2 * 8 * (2 * 75 + 84) / 20,
    "hierarchical": 8 * (2 * 8 * (1 * 18 + 2 * 69) + 14 * 8) / 20,
}


@pytest.mark.parametrize("name", SIZES)
def test_no_token_reads_more_than_is_kept(name):
    model = make(name)
    read = model.count_read_bytes(FULL, 3, torch.float64)
    assert read == pytest.approx(3 * READ[name])
    assert read <= 3 * BYTES[name]


@pytest.mark.parametrize("name", SIZES)
def test_what_is_kept_has_the_bytes_that_it_says(name):
    model = make(name)
    assert model.count_bytes(FULL, 3, torch.float64) == 3 * BYTES[name]
    state, labels = model.begin(3, FULL), torch.zeros(3, dtype=torch.long)
    state.start(labels)
    for step, codes in enumerate(draw_codes(model, 3)[:, model.order].T[:-1]):
        state.step(step, codes)
        assert state.bytes == 3 * BYTES[name]
        held = find_storages([state, labels])  # class numbers are the caller's
        assert sum(held.values()) == 3 * BYTES[name] + labels.nbytes


def find_storages(kept: object) -> dict[int, int]:
    """The bytes of all memory that a state holds, by its address."""
    if isinstance(kept, torch.Tensor):
        memory = kept.untyped_storage()
        return {memory.data_ptr(): memory.nbytes()} if memory.nbytes() else {}
    if isinstance(kept, torch.nn.Module):
        return {}
    if not isinstance(kept, list | tuple | dict):
        kept = vars(kept) if hasattr(kept, "__dict__") else {}
    inside = kept.values() if isinstance(kept, dict) else kept
    return {place: size for each in inside for place, size in find_storages(each).items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_limited_cache_is_refused(name):
    with pytest.raises(fewlines.FewlinesError, match="has no key-value cache; write policy: full"):
        make(name).limit(fewlines.cache("lines", lines=1))


def test_one_that_draws_coarse_to_fine_completes_no_image():
    model = make("hierarchical")
    assert sorted(model.order.tolist()) == list(range(20))
    assert model.order.tolist()[:6] == [0, 2, 4, 10, 12, 14]  # every second of every second line
    with pytest.raises(fewlines.FewlinesError, match="does not draw line by line"):
        generate(model, [0], FULL, prompt=[[1, 2]])


@pytest.mark.parametrize("name", SIZES)
def test_its_bytes_are_counted_without_its_weights(name):
    model = make(name)
    with torch.device("meta"):
        bare = type(model)(model.shape)
    counted = bare.count_bytes(FULL, 2, torch.float32)
    assert counted == model.float().count_bytes(FULL, 2, torch.float32)
    assert 0 < bare.count_read_bytes(FULL, 2, torch.float32) <= counted


@pytest.mark.parametrize("name", SIZES)
def test_sixteen_bits_draw_and_predict_nearly_the_same(name):
    model = make(name).float()
    labels, codes = torch.tensor([0, 3]), draw_codes(model, 2)
    assert generate(model, labels, FULL, precision=torch.bfloat16).shape == codes.shape
    half = model.prepare(torch.bfloat16, 2)
    by_steps = predict_by_steps(half, labels, codes, FULL, torch.bfloat16).float()
    exact = model.teacher_forced(labels, codes)
    assert (by_steps - exact).abs().mean() < 0.05 * exact.std()
