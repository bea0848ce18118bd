"""The Python API: what is natural works, and all else gets a sentence."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import fewlines
from conftest import tiny_transformer
from fewlines.cache.schedule import Schedule, sample_weights
from fewlines.decode.loop import Decoder
from fewlines.errors import FewlinesError
from fewlines.models.checkpoint import save_network
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape

FULL = fewlines.cache("full")
LINES = fewlines.cache("lines", lines=2)

# Labels and options of `generate`, and how many images come back.
WORKS = {
    "one label": (2, {}, 1),
    "a list": ([0, 1, 2, 3], {}, 4),
    "a tuple": ((0, 1), {}, 2),
    "none at all": ([], {}, 0),
    "NumPy's integers": (np.array([0, 1]), {}, 2),
    "a NumPy scalar": (np.int64(1), {}, 1),
    "bytes": (torch.tensor([0, 1], dtype=torch.uint8), {}, 2),
    "short integers": (torch.tensor([0, 1], dtype=torch.int16), {}, 2),
    "a scalar tensor": (torch.tensor(1), {}, 1),
    "the null class": (3, {}, 1),
    "a NumPy seed": (1, {"seed": np.int64(3)}, 1),
    "a seed of thirty digits": (1, {"seed": 10**30}, 1),
    "a batch larger than all": ([0, 1], {"batch": 100}, 2),
    "a prompt in lists": ([0, 1], {"prompt": [[1, 2], [3, 4]]}, 2),
    "a prompt in NumPy": ([0], {"prompt": np.zeros((1, 20), np.int32)}, 1),
    "an empty prompt": ([0], {"prompt": torch.zeros(1, 0)}, 1),
    "keys in 16 bits": ([0], {"storage": torch.float16}, 1),
    "64 bits beside keys in 16": ([0], {"precision": torch.float64, "storage": torch.float16}, 1),
    "64 bits beside keys in 32": ([0], {"precision": torch.float64, "storage": torch.float32}, 1),
}  # fmt: skip
REFUSED = {
    "a word": ("cat", {}, "labels: not numbers"),
    "nothing": (None, {}, "labels: not numbers"),
    "floats": ([0.0, 1.0], {}, "labels: float32, not whole numbers"),
    "truths": ([True], {}, "labels: bool, not whole numbers"),
    "a table": ([[0], [1]], {}, r"labels: of shape \(2, 1\); write one class number"),
    "a class too many": (4, {}, r"labels must lie in 0 … 3 \(3: no class\)"),
    "below zero": ([-1], {}, "labels must lie in 0 … 3"),
    "a seed below zero": (0, {"seed": -1}, "seed: -1 is not a whole number of at least 0"),
    "half a seed": (0, {"seed": 0.5}, "seed: 0.5 is not a whole number"),
    "a true seed": (0, {"seed": True}, "seed: True is not a whole number"),
    "no batch": (0, {"batch": 0}, "batch: 0 is not a whole number of at least 1"),
    "images before the first": (0, {"first": -1}, "first: -1 is not a whole number"),
    "bytes as storage": (
        0, {"storage": torch.int8}, "storage: torch.int8 is not one of torch.float32, torch",
    ),
    "integers as precision": (0, {"precision": torch.int32}, "precision: torch.int32 is not one"),
    "a code too large": (0, {"prompt": [[16]]}, "prompt must lie in 0 … 15"),
    "codes in floats": (0, {"prompt": [[0.5]]}, "prompt: float32, not whole numbers"),
    "a prompt of others": (0, {"prompt": [[1], [2]]}, r"prompt: of shape \(2, 1\); there are 1"),
    "a flat prompt": (0, {"prompt": [1, 2]}, r"write \(n, k\), n = 1"),
    "a prompt too long": (0, {"prompt": [[0] * 21]}, "an image has 20 tokens"),
}  # fmt: skip


def test_a_budget_that_holds_the_image_is_said_to_be_the_full_cache(model, capsys):
    fewlines.generate(model, 0, fewlines.cache("lines", lines=4))
    said = capsys.readouterr().err
    assert (
        said == "lines-4lines: the budget holds all 20 tokens of an image; this is the full cache\n"
    )
    for cache in (FULL, LINES):
        fewlines.generate(model, 0, cache)
    assert "the budget holds" not in capsys.readouterr().err


def test_a_model_is_prepared_and_begun_as_it_was_asked(model, monkeypatch):
    """For the largest batch, both rows of a guided image, and the precision and storage named."""
    prepared, begun, told = [], [], []
    prepare, begin = type(model).prepare, type(model).begin

    def preparing(self, precision, rows, **more):
        prepared.append((precision, rows))
        return prepare(self, precision, rows, **more)

    def beginning(self, rows, cache, **more):
        begun.append((rows, more["storage"], more["engine"]))
        return begin(self, rows, cache, **more)

    monkeypatch.setattr(type(model), "prepare", preparing)
    monkeypatch.setattr(type(model), "begin", beginning)
    fewlines.generate(model, [0, 1, 2], LINES, batch=2, done=told.append)
    assert (prepared, told) == ([(torch.float32, 2)], [2, 1])
    Decoder(model, 3, LINES)
    assert begun == [(2, None, "lean"), (1, None, "lean"), (3, None, "lean")]
    guided = fewlines.Sampler(guidance=2.0)
    options = {"sampler": guided, "precision": torch.float64, "storage": torch.float16}
    fewlines.generate(model, [0, 1, 2], LINES, **options)
    assert prepared[1:] == [(torch.float64, 6)]
    assert begun[3:] == [(6, torch.float16, "lean")]


def test_the_seed_is_nought_unless_it_is_given(model):
    plain = fewlines.generate(model, [0, 1], FULL)
    assert torch.equal(plain, fewlines.generate(model, [0, 1], FULL, seed=0))
    assert not torch.equal(plain, fewlines.generate(model, [0, 1], FULL, seed=1))


@pytest.mark.parametrize("name", WORKS)
def test_what_is_natural_draws(model, name):
    labels, options, images = WORKS[name]
    codes = fewlines.generate(model, labels, LINES, **options)
    assert codes.shape == (images, 20)
    assert codes.dtype == torch.int64
    if images:
        assert 0 <= codes.min() <= codes.max() < 16
        prompt = torch.as_tensor(options.get("prompt", torch.zeros(images, 0)))
        assert torch.equal(codes[:, : prompt.shape[1]], prompt.long())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_gets_a_sentence(model, name):
    labels, options, message = REFUSED[name]
    with pytest.raises(FewlinesError, match=message):
        fewlines.generate(model, labels, FULL, **options)


CONSTRUCTED = [
    (lambda: fewlines.Sampler(temperature=-1), "sampler: temperature: .*greater than or equal"),
    (lambda: fewlines.Sampler(temperature=float("nan")), "temperature: .*finite"),
    (lambda: fewlines.Sampler(temperature="hot"), "temperature: .*valid number"),
    (lambda: fewlines.Sampler(top_k=-1), "top_k: .*greater than or equal to 0"),
    (lambda: fewlines.Sampler(top_k=1.5), "top_k: .*valid integer"),
    (lambda: fewlines.Sampler(top_p=0), "top_p: .*greater than 0"),
    (lambda: fewlines.Sampler(top_p=1.5), "top_p: .*less than or equal to 1"),
    (lambda: fewlines.Sampler(guidance=float("inf")), "guidance: .*finite"),
    (lambda: fewlines.cache("lines"), "lines needs a budget"),
    (lambda: fewlines.cache("lines", lines=0), "budget: .*above 0"),
    (lambda: fewlines.cache("lines", lines="some"), "'some' is not a number of lines"),
    (lambda: fewlines.cache("lines", lines=2, tokens=7), "one of lines, fraction and tokens"),
    (lambda: fewlines.cache("lins", lines=2), "unknown policy 'lins'; there are"),
    (lambda: fewlines.cache("lines", lines=2, merge=3), "merge: .*valid boolean"),
    (lambda: fewlines.cache("lines", lines=2, allocation="all"), "unknown allocation 'all'"),
    (lambda: fewlines.cache("lines", lines=2, sinks=1), "does not take sinks; its options: none"),
    (lambda: fewlines.cache("line_ar", lines=2, pool="Mean"), "line_ar: pool: .*'mean', 'max'"),
    (lambda: fewlines.cache("line_ar", lines=2, recent=-1), "recent: .*equal to 0"),
    (lambda: fewlines.cache("line_ar", lines=2, decay=2), "decay: .*less than or equal to 1"),
    (lambda: fewlines.cache("snapkv", lines=2, window=0), "snapkv: window: .*greater than 0"),
    (lambda: fewlines.cache("snapkv", lines=2, kernel=4), "snapkv: kernel: write an odd number"),
    (lambda: fewlines.cache("streaming", lines=2, sinks="four"), "sinks: write a number of tokens"),
    (lambda: fewlines.cache("tova", lines=2, every="two"), "tova: every: .*valid integer"),
    (lambda: fewlines.cache("h2o", lines=2, recent=1.5), "h2o: recent: .*less than or equal to 1"),
    (lambda: fewlines.cache("corrected", lines=2, floor=0), "corrected: floor: .*greater than 0"),
    (lambda: TokenizerShape(0, (4,), 0, 8, 4), "tokenizer: channels: .*greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("construct", "message"), CONSTRUCTED)
def test_objects_check_themselves(construct, message):
    with pytest.raises(FewlinesError, match=message):
        construct()


def test_a_temperature_of_zero_takes_the_likeliest_code(model):
    greedy = fewlines.Sampler(temperature=0)
    one, other = (fewlines.generate(model, [0, 1], FULL, seed, sampler=greedy) for seed in (0, 1))
    assert torch.equal(one, other)
    assert torch.equal(
        one, fewlines.generate(model, [0, 1], FULL, sampler=fewlines.Sampler(top_k=1))
    )
    expected = model.teacher_forced(torch.tensor([0, 1]), one).argmax(-1)
    assert torch.equal(one, expected)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16])
@pytest.mark.parametrize("cache", [FULL, LINES], ids=["full", "lines"])
def test_a_model_in_16_bits_draws_what_its_rounded_weights_do(cast, cache):
    rounded = cast(tiny_transformer())
    dtype = rounded.dtype
    again = copy.deepcopy(rounded).float()
    drawn = fewlines.generate(rounded, [0, 1, 2], cache, seed=1)
    assert torch.equal(drawn, fewlines.generate(again, [0, 1, 2], cache, seed=1, storage=dtype))
    assert rounded.dtype == dtype  # it was not changed
    logits = rounded.teacher_forced(torch.tensor([0]), drawn[:1])
    torch.testing.assert_close(
        logits.float(), again.teacher_forced(torch.tensor([0]), drawn[:1]), atol=0.3, rtol=0.1
    )


@pytest.mark.parametrize("sampler", [None, fewlines.Sampler(temperature=0)])
def test_weights_that_are_not_finite_draw_nothing(sampler):
    broken = tiny_transformer()
    broken.layers[1].attention.wo.weight[0, 0] = torch.nan
    for cache in (FULL, LINES):
        with pytest.raises(FewlinesError, match="logits are not finite"):
            fewlines.generate(broken, [0, 1], cache, sampler=sampler)


@pytest.fixture
def tokenizer() -> ConvTokenizer:
    return ConvTokenizer(TokenizerShape(1, (4, 4), 0, 8, 4)).eval()


def test_the_tokenizer_takes_images_and_codes_and_nothing_else(tokenizer):
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, tokenizer.encode(images.numpy()))
    assert tokenizer.decode(codes).shape == images.shape
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes.int().numpy()))
    for wrong, message in (
        (images / 255, "images of float32; write uint8, 0 … 255"),
        (images.long(), "images of int64; write uint8"),
        (images[0], r"images of shape \(1, 8, 8\); write \(n, 1, H, W\)"),
        (images.expand(-1, 3, -1, -1), r"write \(n, 1, H, W\), H and W multiples of 2"),
        (images[..., :7], "multiples of 2"),
    ):
        with pytest.raises(FewlinesError, match=message):
            tokenizer.encode(wrong)
    for wrong, message in (
        (codes.flatten(1), r"codes of shape \(2, 16\); write \(n, h, w\)"),
        (codes.float(), "codes: float32, not whole numbers"),
        (codes + 8, "codes must lie in 0 … 7"),
        (codes - 9, "codes must lie in 0 … 7"),
    ):
        with pytest.raises(FewlinesError, match=message):
            tokenizer.decode(wrong)


def test_a_schedule_says_when_weights_are_not_those_it_was_made_for(tmp_path):
    model = tiny_transformer()
    made = Schedule.of(LINES, model.shape.geometry)
    schedule = Schedule(made.slug, made.evictions, sample_weights(model))
    schedule.save(tmp_path / "schedule")
    schedule = fewlines.load_schedule(tmp_path / "schedule")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = fewlines.generate(model, [0, 1], schedule)
        fewlines.generate(copy.deepcopy(model).half(), [0], schedule)
    assert torch.equal(drawn, fewlines.generate(model, [0, 1], LINES))
    other = tiny_transformer()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="made for other weights of this shape"):
        fewlines.generate(other, [0], schedule)


def test_files_that_are_something_else_are_named(tmp_path, tokenizer):
    save_network(tmp_path / "tokenizer", tokenizer)
    (tmp_path / "text").write_text("weights")
    for load, path, message in (
        (fewlines.load_model, tmp_path, "is not a complete safetensors file"),
        (fewlines.load_model, tmp_path / "nowhere", "nowhere does not exist"),
        (fewlines.load_model, tmp_path / "text", "is not a complete safetensors file"),
        (fewlines.load_model, tmp_path / "tokenizer", "holds a tokenizer, not a model"),
        (fewlines.load_schedule, tmp_path / "tokenizer", "is not a schedule"),
        (fewlines.load_tokenizer, tmp_path / "text", "is not a complete safetensors file"),
    ):
        with pytest.raises(FewlinesError, match=message) as caught:
            load(path)
        assert "delete" not in str(caught.value)
