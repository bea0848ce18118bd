"""Whatever is given is used or refused with a sentence: never a traceback, never a NaN in silence.

A few examples in every run of the tests; `make fuzz` takes minutes.
"""
# ruff: noqa: PT017 - whether there is an error is not known beforehand

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

import fewlines
from conftest import tiny_transformer
from fewlines.cache.policy import list_policies
from fewlines.cache.schedule import Schedule
from fewlines.calibration.data import Calibration
from fewlines.config import Experiment, dump_experiment, load_experiment, validate_experiment
from fewlines.config.experiment import make_schema
from fewlines.config.reading import find_sections
from fewlines.data import SOURCES, ImageData, Split
from fewlines.errors import FewlinesError
from fewlines.files import read_json, write_json, write_tensors
from fewlines.models.base import TokenSpec
from fewlines.models.checkpoint import save_network
from fewlines.models.llamagen.checkpoint import load_checkpoint
from fewlines.models.llamagen.tokenizer import LlamaGenTokenizer, LlamaGenTokenizerShape
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape
from fewlines.stages.tokens import check_data, read_codes, read_tokens

QUIET = settings(suppress_health_check=list(HealthCheck), deadline=None)

NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([10**30, -(10**30), 0.5, -0.5, 1e308, math.inf, math.nan])
)
CACHE_NAMES = ["full", "lines", "line_ar-2lines", "scheduled+merge-3lines", "x-1of0"]
WORDS = ["base", "adapted", "folder", "all", "samples", "likelihood", "auto", "float16", "mean"]
NAMES = st.sampled_from([*CACHE_NAMES, *WORDS, "", "a b", "../x", "é", "\0"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES)
VALUES = st.recursive(
    SCALARS,
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.dictionaries(st.one_of(NAMES, st.integers(0, 3)), inside, max_size=3),
    ),
    max_leaves=6,
)


def list_keys(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the schema, sections and what is in them."""
    for name, field in schema.model_fields.items():
        yield (*prefix, name)
        for section in find_sections(field.annotation):
            yield from list_keys(section, (*prefix, name))


KEYS = sorted(set(list_keys(make_schema("llamagen"))))
CACHE_LINES = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from([*list_policies(), "lins"]),
        "budget": st.dictionaries(
            st.sampled_from(["lines", "tokens", "fraction", "rows"]), SCALARS
        ),
        "merge": SCALARS,
        "allocation": st.one_of(
            st.sampled_from(["uniform", "mass", "ada", "bands", "calibrated"]), SCALARS
        ),
        "options": st.dictionaries(
            st.sampled_from(["sinks", "every", "window", "pool", "recent", "power"]), SCALARS
        ),
        "measure": st.one_of(st.sampled_from(["likelihood", "samples", "all"]), SCALARS),
    },
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A few keys of the schema with values of all kinds, some of them right."""
    content: dict[str, Any] = {}
    for path in draw(st.lists(st.sampled_from(KEYS), max_size=5)):
        inside = content
        for part in path[:-1]:
            there = inside.setdefault(part, {})
            if not isinstance(there, dict):
                break
            inside = there
        else:
            inside[path[-1]] = draw(VALUES)
    if draw(st.booleans()):
        content["caches"] = draw(st.lists(CACHE_LINES, max_size=4))
    return content


@QUIET
@given(content=configurations())
def test_a_configuration_is_planned_or_refused(content):
    try:
        experiment = validate_experiment(content)
    except FewlinesError as error:
        assert str(error)
        return
    check_numbers(experiment.model_dump())
    rows = experiment.rows
    assert ("base", "full") in rows
    for model, cache in rows:
        assert experiment.get_cache(cache)
        assert experiment.get_weights(model)
    again = load_text(dump_experiment(experiment))
    assert again.model_dump(mode="json") == experiment.model_dump(mode="json")


def load_text(text: str) -> Experiment:
    return validate_experiment(yaml.safe_load(text))


def check_numbers(value: object) -> None:
    """All of them finite."""
    if isinstance(value, dict):
        for each in value.values():
            check_numbers(each)
    elif isinstance(value, list | tuple):
        for each in value:
            check_numbers(each)
    elif isinstance(value, float):
        assert math.isfinite(value)


SPEC = TokenSpec((4, 5), 16, 3)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """A good file of every format that is read, and what reads it."""
    folder = tmp_path_factory.mktemp("originals")
    model, generator = tiny_transformer(), torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 20), generator=generator)
    labels = torch.arange(8) % 3
    save_network(folder / "model", model)
    save_network(folder / "tokenizer", ConvTokenizer(TokenizerShape(1, (4, 4), 0, 8, 4)))
    tokens = {"test_codes": codes, "test_labels": labels}
    tokens |= {"train_codes": codes.flip(0), "train_labels": labels.flip(0)}
    write_tensors(folder / "tokens", tokens, {"grid": (4, 5), "codes": 16, "classes": 3})
    attention = np.tril(np.random.default_rng(0).random((2, 2, 20, 20), np.float32))
    Calibration(attention, (4, 5), 3).save(folder / "calibration")
    Schedule.of(fewlines.cache("lines", lines=2), model.shape.geometry).save(folder / "schedule")
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    train, test = Split(images, labels[:4]), Split(images + 1, labels[4:])
    ImageData(train, test, ["a", "b", "c"]).save(folder / "images")
    write_json(folder / "json", {"nll": 2.0, "rows": [1, 2]})
    np.save(folder / "codes.npy", codes.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    published = LlamaGenTokenizer(LlamaGenTokenizerShape(3, 32, (1, 1), 1, 4, 8, 4))
    torch.save({"model": published.state_dict()}, folder / "vq.pt")
    (folder / "yaml").write_text("name: x\nmodel: {steps: 3}\ncaches:\n  - {policy: full}\n")
    Image.new("RGB", (16, 16), "red").save(folder / "picture.png")
    Image.new("RGB", (16, 16), "red").save(folder / "picture.jpg")
    small = {"likelihood": {"images": 4}, "adaptation": {"models": None}, "paper": {"caches": []}}
    experiment = validate_experiment({**small, "caches": [{"policy": "full"}]})

    def see(path: Path) -> object:
        other = path.with_name("other" + path.suffix)
        Image.new("RGB", (9, 9)).save(other)
        return SOURCES["folder"](path.parent, 8)

    readers: dict[str, Callable[[Path], object]] = {
        "model": lambda path: fewlines.load_model(path),
        "tokenizer": lambda path: fewlines.load_tokenizer(path),
        "tokens": lambda path: (check_data(experiment, path), read_tokens(path, SPEC)),
        "calibration": lambda path: Calibration.load(path).check(model.shape.geometry),
        "schedule": lambda path: Schedule.load(path).plan(model.shape.geometry),
        "images": ImageData.load,
        "json": read_json,
        "codes.npy": lambda path: read_codes(path, folder / "labels.npy", SPEC),
        "vq.pt": fewlines.load_tokenizer,
        "checkpoint.pt": lambda path: load_checkpoint(path, heads=4, side=4),
        "yaml": lambda path: load_experiment([path]),
        "picture.png": see,
        "picture.jpg": see,
    }
    return {name: ((folder / name).read_bytes(), read) for name, read in readers.items()}


FORMATS = ["model", "tokenizer", "tokens", "calibration", "schedule", "images", "json",
           "codes.npy", "checkpoint.pt", "vq.pt", "yaml", "picture.png", "picture.jpg"]  # fmt: skip


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes cut off, put in, or changed, at a place that is a share of the whole."""
    place, kind = draw(st.floats(0, 1)), draw(st.sampled_from(["cut", "insert", "change", "drop"]))
    early = draw(st.booleans())  # headers are read first and damaged most
    junk = draw(st.binary(min_size=1, max_size=9))

    def apply(content: bytes) -> bytes:
        at = int(place * (min(len(content), 400) if early else len(content)))
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + junk + content[at:]
        if kind == "drop":
            return content[:at] + content[at + len(junk) :]
        return content[:at] + junk + content[at + len(junk) :]

    return apply


@pytest.mark.parametrize("name", FORMATS)
@QUIET
@given(damage=damages())
def test_a_damaged_file_is_read_or_refused(originals, tmp_path_factory, name, damage):
    content, read = originals[name]
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / Path(name).with_stem("damaged").name
    path.write_bytes(damage(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow and torch, about what they read
        try:
            read(path)
        except FewlinesError as error:
            assert name == "yaml" or "damaged" in str(error)  # the file is named
            assert "delete" not in str(error)


ANYTHING = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.lists(st.integers(-2, 20), max_size=3), max_size=3),
    st.sampled_from(
        [np.arange(3), np.zeros((2, 2)), np.array("a"), torch.arange(4), torch.tensor(2),
         torch.tensor([True]), torch.zeros(1, dtype=torch.float64), torch.tensor([1 + 1j]),
         torch.float16, torch.int8, b"bytes", {1: 2}, object()]
    ),
)  # fmt: skip


def attempt(call: Callable[..., Any], **arguments: Any) -> Any:
    """What comes back; None where a sentence did."""
    try:
        return call(**arguments)
    except FewlinesError as error:
        assert str(error)
        return None


@QUIET
@given(
    labels=ANYTHING,
    options=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("seed", "first", "batch", "prompt", "storage", "precision"), ANYTHING
        ),
    ),
)
def test_generate_draws_or_refuses(model, labels, options):
    drawn = attempt(
        fewlines.generate, model=model, labels=labels, cache=fewlines.cache("lines", lines=1),
        **options,
    )  # fmt: skip
    if drawn is not None:
        assert drawn.shape[1] == 20
        assert drawn.numel() == 0 or 0 <= drawn.min() <= drawn.max() < 16


@QUIET
@given(
    options=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("temperature", "top_k", "top_p", "guidance"), ANYTHING)
    )
)
def test_a_sampler_draws_or_is_refused(options):
    sampler = attempt(fewlines.Sampler, **options)
    if sampler is not None:
        codes = sampler(torch.randn(3, 7), torch.rand(3, dtype=torch.float64))
        assert 0 <= codes.min() <= codes.max() < 7


CACHE_OPTIONS = (
    "lines fraction tokens merge allocation calibration sinks every window kernel pool recent "
    "anchor decay seed share power floor"
)


@QUIET
@given(
    policy=st.one_of(st.sampled_from([*list_policies()]), SCALARS),
    options=st.fixed_dictionaries({}, optional=dict.fromkeys(CACHE_OPTIONS.split(), SCALARS)),
)
def test_a_cache_is_made_and_planned_or_refused(policy, options):
    made = attempt(fewlines.cache, policy=policy, **options)
    if made is not None:
        assert made.slug
        attempt(made.plan, geometry=tiny_transformer().shape.geometry)


@QUIET
@given(images=ANYTHING, codes=ANYTHING)
def test_a_tokenizer_works_or_refuses(images, codes):
    tokenizer = ConvTokenizer(TokenizerShape(1, (4, 4), 0, 8, 4))
    attempt(tokenizer.encode, images=images)
    attempt(tokenizer.decode, indices=codes)
