"""Steps of a decode at any position, on buffers of random numbers: what is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from fewlines import machine
from fewlines.bench.profile import profile_steps
from fewlines.cache.spec import Cache
from fewlines.decode.loop import Decoder
from fewlines.decode.sampler import draw_noise
from fewlines.geometry import Geometry
from fewlines.models.base import Model

Engine = Literal["lean", "stock", "stock-graph", "hf-dynamic", "hf-static", "hf-fewlines"]
STEPS = 7  # timed at a position, where steps are alike


@dataclass(frozen=True)
class Row:
    """One way of decoding: an `engine`, and the `cache` it keeps."""

    engine: Engine
    cache: Cache
    batch: int
    storage: torch.dtype

    @property
    def reads_all(self) -> bool:
        """The whole buffer at every step, written or not."""
        return self.engine in ("stock", "stock-graph", "hf-static")


@dataclass(frozen=True)
class Setting:
    """Where rows are compared.

    Attributes:
        shape_name: of a published shape.
        family: of the model.
        shape: on the setting's grid.
        precision: of the products.
        rows: what is compared.
        full_run: decode a whole image once as well, to check the sum of the steps.
        limit_seconds: for one measurement.
        threads: of torch.
        cap: bytes that each row's batch was chosen to fill; None where the batch is given.
    """

    shape_name: str
    family: type[Model]
    shape: Any
    precision: torch.dtype
    rows: tuple[Row, ...]
    full_run: bool
    limit_seconds: float
    threads: int
    cap: float | None = None

    def predict(self, row: Row) -> Any:
        """Make the cost model of a row."""
        sizes = (row.batch, row.cache, self.precision, row.storage)
        return self.family.Cost(self.shape, *sizes, whole=row.reads_all)


def list_positions(setting: Setting, row: Row) -> list[int]:
    """List image tokens to time steps at, so that costs between them lie on straight lines."""
    geometry = setting.shape.geometry
    plan = row.cache.plan(geometry)
    last = geometry.n_tokens - 1 - geometry.width
    if row.reads_all:
        wanted = [0, last]
    elif plan.is_full:
        wanted = [0, last // 8, last // 4, last // 2, 3 * last // 4, last]
    else:
        full = int(plan.entries.max())
        wanted = [0, full // 2, full, full + geometry.width, (full + last) // 2, last]
    lines = {min(position, last) // geometry.width * geometry.width for position in wanted}
    return sorted(lines)


class DecodeSteps:
    """Steps of our own engines, by a model that is `prepare`d."""

    def __init__(self, model: Model, setting: Setting, row: Row) -> None:
        """Begin a batch on buffers of random numbers."""
        self.geometry, self.batch = setting.shape.geometry, row.batch
        self.decoder = Decoder(model, row.batch, row.cache, None, row.engine, row.storage)
        self.buffers: Any = getattr(self.decoder.state, "buffers")  # noqa: B009
        self.buffers.fill(torch.Generator().manual_seed(1))
        self.codes = torch.zeros(row.batch, dtype=torch.long, device=machine.device())
        self.noise = draw_noise(0, range(row.batch), 1)[:, 0].to(machine.device())
        self.scores = _scores(row.cache, self.geometry)

    def seconds(self, position: int) -> float:
        """Time a step, from image token `position` on: the mean over a line of a policy that works
        once per line, the median of a few where steps are alike."""
        self._steps(position, 1)  # for warming up
        if self.scores:
            if self.decoder.graphed:  # a graph for each place where attention is remembered
                self.line(position)
                self.line(position)
            return self.line(position)
        return float(np.median(self._steps(position, STEPS)))

    def line(self, position: int) -> float:
        """Time a step, the mean over the line that begins at a position."""
        return float(np.mean(self._steps(position, self.geometry.width)))

    def _steps(self, position: int, count: int) -> list[float]:
        self.buffers.seek(position)
        steps = range(position, position + count)
        return [machine.take_seconds(partial(self._step, step)) for step in steps]

    def _step(self, step: int) -> None:
        self.codes = self.decoder.step(step, self.codes, self.noise)

    def profile(self, position: int) -> dict[str, float]:
        """Share out the seconds of a step, see `profile_steps`."""
        spent = profile_steps(self.decoder.model, lambda: self.seconds(position))
        return {name: seconds / sum(spent.values()) for name, seconds in spent.items()}

    def whole(self) -> float:
        """Time a whole batch, after the prefix."""
        self.buffers.seek(0)

        def run() -> None:
            for step in range(self.geometry.n_tokens - 1):
                self._step(step)

        return machine.take_seconds(run)


def make_random_model(setting: Setting, batch: int) -> Model:
    """Make a model of a setting's shape with random weights, ready to draw batches of that size."""
    return _draw_weights(setting).prepare(setting.precision, batch, consume=True)


def _draw_weights(setting: Setting) -> Model:
    generator, family = torch.Generator().manual_seed(0), setting.family
    return family.draw(setting.shape, setting.precision, generator).to(machine.device())


def make_peer(setting: Setting) -> Callable[[Row], Any]:
    """Make what begins a row by transformers, with the same weights."""
    from fewlines.integrations.huggingface import LlamaSteps, make_llama

    weights: Any = _draw_weights(setting)
    llama, geometry = make_llama(weights), setting.shape.geometry

    def steps(row: Row) -> Any:
        count = geometry.width if _scores(row.cache, geometry) else STEPS
        return LlamaSteps(llama, row.batch, geometry, row.engine, count, row.cache, row.storage)

    return steps


def _scores(cache: Cache, geometry: Geometry) -> bool:
    """Whether a step of a line costs more than the others, so that a line has to be timed."""
    return cache.plan(geometry).scoring is not None
