"""A tiny real transformer and the caches that every policy is tested under."""

from __future__ import annotations

import os

os.environ["NUMBA_NUM_THREADS"] = "1"  # idle threads of a larger pool spin: two workers, two cores

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # a GPU's kernels are run by the processor, very slowly

import fewlines
from fewlines.cache.policy import OraclePolicy, list_policies
from fewlines.cache.spec import Cache
from fewlines.calibration.data import Calibration, LossCurves
from fewlines.files import write_tensors
from fewlines.geometry import Geometry
from fewlines.models.checkpoint import save_network
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape
from toy_chain import find_times, run_to_the_end

GRID = (4, 5)

settings.register_profile("default", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=3000, deadline=None)  # of `make fuzz`
settings.load_profile("default")


def tiny_transformer(
    dtype: torch.dtype = torch.float32, kv_heads: int = 2, layers: int = 2, head_dim: int = 8
) -> Transformer:
    """Heads of 8 dimensions, as in toy.yaml: a kernel is compiled for each number of them."""
    shape = TransformerShape(
        dim=4 * head_dim,
        layers=layers,
        heads=4,
        kv_heads=kv_heads,
        codes=16,
        classes=3,
        grid=GRID,
        multiple_of=32,
    )
    model = Transformer(shape)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # larger than at the start of training: attention must matter
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


def images(model: Transformer, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and random codes."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(model.shape.codes, (batch, GRID[0] * GRID[1]), generator=generator)
    return torch.arange(batch) % (model.shape.classes + 1), codes


def step_by_step(model: Transformer, labels, codes, attend) -> torch.Tensor:
    """Logits `(B, N, V)`, as decoding has them when it draws these codes."""
    logits = [model(model.embed_labels(labels), 0, attend)]
    for step in range(codes.shape[1] - 1):
        attend.advance(step)
        logits.append(model(model.embed_codes(codes[:, step : step + 1]), step + 1, attend))
    return torch.cat(logits, 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tensors this small are slower on more, and a command that a test runs takes all cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return tiny_transformer()


@pytest.fixture(scope="session")
def model64() -> Transformer:
    return tiny_transformer(torch.float64)


TINY = """
name: tiny
adaptation: {models: null}
caches:
  - {policy: full}
  - {policy: lines, budget: {lines: 1}}
  - {policy: scheduled, budget: {lines: 1}}
paper: {caches: [lines-1lines]}
sampling: {samples: 4, seeds: [0]}
quality: {kid_subset_size: 2}
likelihood: {images: 6, batch: 4}
calibration: {images: 6, curve_images: 2, batch: 3}
tasks:
  completion: {prompt_lines: 2, caches: [full, lines-1lines]}
  unconditional: {labelled: false, caches: [full]}
  guided: {guidance: 3.0, caches: [full]}
"""


@pytest.fixture
def tiny_files(tmp_path) -> Path:
    """A folder with an experiment `config`, a tiny `model` and `tokens` that fit it."""
    (tmp_path / "config").write_text(TINY)
    save_network(tmp_path / "model", tiny_transformer())
    codes = torch.randint(16, (8, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3
    tokens = {"test_codes": codes, "test_labels": labels}
    tokens |= {"train_codes": codes.flip(0), "train_labels": labels.flip(0)}
    write_tensors(tmp_path / "tokens", tokens, {"grid": GRID, "codes": 16, "classes": 3})
    return tmp_path


DECODED = [
    name
    for name, policy in list_policies().items()
    if name != "full" and not issubclass(policy, OraclePolicy)
]
BUDGETS = [{"lines": 1}, {"lines": 2}, {"tokens": 7}, {"lines": 4}]  # the last holds everything


def calibrated(cache: Cache, geometry: Geometry) -> Cache:
    """With a calibration of random attention, if the policy goes by one."""
    if not cache.requires:
        return cache
    n = geometry.n_tokens
    heads = (geometry.layers, geometry.heads)
    random = np.random.default_rng(0)
    attention = np.tril(random.random((*heads, n, n), np.float32))
    loss = np.append(-np.sort(-random.random((*heads, 3))), np.zeros((*heads, 1)), axis=-1)
    more = {count: loss * random.uniform(0, 1, (*heads, 1)) for count in (2, 4)}
    curves = LossCurves(np.array([2, 4, 9, n]), loss, more)
    return replace(cache, calibration=Calibration(attention, geometry.grid, 1, curves))


CACHES = (
    [
        calibrated(fewlines.cache(policy, **budget, merge=merge), tiny_transformer().shape.geometry)
        for policy in DECODED
        for budget in BUDGETS
        for merge in (False, True)
    ]
    + [
        calibrated(
            fewlines.cache(policy, lines=lines, merge=merge, allocation=allocation),
            tiny_transformer().shape.geometry,
        )
        for lines in (1, 2)
        for policy, merge, allocation in (
            ("scheduled", False, "mass"),
            ("scheduled", True, "mass"),
            ("scheduled", True, "calibrated"),
            ("scheduled", True, "bands"),
            ("corrected", True, "calibrated"),
        )
    ]
    + [
        fewlines.cache("line_ar", lines=2, anchor=1, pool=pool)
        for pool in ("max", "query", "decayed")
    ]
    + [
        fewlines.cache(policy, lines=2, merge=merge, every=every, **options)
        for policy, options in (
            ("h2o", {}),
            ("tova", {}),
            ("snapkv", {"window": 3}),
            ("line_ar", {"pool": "query"}),
            ("line_ar", {"pool": "decayed", "decay": 0.9}),
        )
        for every in (1, 2)
        for merge in (False, True)
    ]
    + [
        fewlines.cache(policy, lines=2, merge=merge, allocation="pyramid")
        for policy in ("snapkv", "streaming")
        for merge in (False, True)
    ]
    + [
        calibrated(
            fewlines.cache(policy, lines=2, allocation=allocation),
            tiny_transformer().shape.geometry,
        )
        for policy in ("snapkv", "streaming")
        for allocation in ("headkv", "ada")
    ]
)


def planned(output: str) -> dict[str, int]:
    """Jobs of a dry run, by rule."""
    table = output.split("count", 1)[1] if "count" in output else ""
    return {
        rule: int(count)
        for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
        if rule not in ("total", "all")
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The toy experiment, finished: made once, by whichever worker asks first. Others read it at
    the same time, so nobody writes into it: see `own_folder`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "toy.lock"):
        if not (shared / "toy" / "killed").exists():
            run_to_the_end(shared / "toy")
    before = find_times(shared / "toy")
    yield shared / "toy"
    assert find_times(shared / "toy") == before, "a test wrote into the folder that all read"


@pytest.fixture
def own_folder(folder, tmp_path) -> Path:
    """A copy of the finished toy experiment, to run Snakemake in."""
    copy = tmp_path / "own"
    shutil.copytree(folder, copy, symlinks=True)
    return copy


@pytest.fixture
def run(folder) -> Path:
    return folder / "results" / "toy"


def pytest_collection_modifyitems(items):
    """The whole chain first, as it takes longest; last the files that would wait for it."""
    waiting = {item.path for item in items if "folder" in item.fixturenames}

    def rank(item) -> int:
        return 0 if item.path.name == "test_workflow.py" else 1 + (item.path in waiting)

    items.sort(key=rank)


def pytest_sessionfinish(session):
    """When all workers are done, the toy's results go: they are large."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shared = session.config._tmp_path_factory.getbasetemp()
        shutil.rmtree(shared / "toy" / "results", ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    """How much was thrown at it, in the output of every run."""
    passed = terminalreporter.stats.get("passed", [])
    kills = sum(value for report in passed for name, value in report.user_properties)
    wrong = sum("test_bad_input" in report.nodeid for report in passed)
    terminalreporter.write_line(f"wrong inputs refused: {wrong}; processes killed: {kills}")
