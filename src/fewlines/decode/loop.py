"""The one decode loop, for every cache and every family: a token a step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewlines.arguments import read_count
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.decode.graphs import GraphedSteps
from fewlines.decode.inputs import read_conditions, read_labels, read_prompt
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.errors import FewlinesError
from fewlines.models.base import AttentionModel, Model, Recomputation, State

Watch = Callable[[int, State], None]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Decoder:
    """A batch being drawn, a token a step."""

    def __init__(
        self,
        model: Model,
        rows: int,
        cache: Cache | Schedule,
        sampler: Sampler | None = None,
        engine: str = "lean",
        storage: torch.dtype | None = None,
    ) -> None:
        """Begin a batch.

        Args:
            model: as it is, or `prepare`d, which is faster.
            rows: images of the batch.
            cache: what is retained.
            sampler: from logits to codes.
            engine: how a full cache is read, one of the model's `engines`, or `stock-graph`:
                `stock`, but replayed on a GPU.
            storage: what keys and values are kept in; the model's own precision where None.
        """
        self.model, self.sampler = model, sampler or Sampler()
        if self.sampler.guided and not model.has_null_class:
            raise FewlinesError(
                "sampler: guidance: this model never learned to draw without a class; write 1"
            )
        rows_of_model = rows * (1 + self.sampler.guided)
        self.state = (
            Recomputation(model, rows_of_model)
            if engine == "naive"
            else model.begin(rows_of_model, cache, storage=storage, engine=engine)
        )
        self.rows, self.graphed = rows, engine in ("lean", "stock-graph")
        self.graphed &= model.device.type == "cuda" and model.has_kv_cache
        self._bind(self.sampler.guides(1))

    def _bind(self, guides: bool) -> None:
        """Take up steps whose tokens are guided, or are not any more."""
        # Not a bound method: a decoder in a cycle would be freed by the collector, at any moment.
        vocabulary = self.model.spec.codes
        self.draw_next = partial(_draw_next, self.state, self.sampler, guides, vocabulary)
        self.graphs = None
        if self.graphed:
            self.graphs = GraphedSteps(self.draw_next, self.state, self.rows, self.model.device)

    def start(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Draw the first codes `(B,)` of class numbers and noise `(B,)`."""
        if self.sampler.guided:
            labels = torch.cat([labels, self.model.blank(labels)])
        return _draw(self.sampler, self.sampler.guides(0), self.state.start(labels), noise)

    def step(self, step: int, codes: Tensor, noise: Tensor) -> Tensor:
        """Read the codes `(B,)` of image token `step` and draw the next, valid until the next
        call, by noise `(B,)`."""
        if self.sampler.guides(step) and not self.sampler.guides(step + 1):
            self._bind(guides=False)
        self.state.advance(step)
        if self.graphs:
            return self.graphs(codes, noise)
        return self.draw_next(codes, self.state.position, noise)


def _draw_next(
    state: State,
    sampler: Sampler,
    guides: bool,
    vocabulary: int,
    codes: Tensor,
    position: int | Tensor,
    noise: Tensor,
) -> Tensor:
    codes = codes.clamp(max=vocabulary - 1)  # what could not be drawn is reported at the end
    codes = torch.cat([codes, codes]) if sampler.guided else codes
    return _draw(sampler, guides, state.forward(codes, position), noise)


def _draw(sampler: Sampler, guides: bool, logits: Tensor, noise: Tensor) -> Tensor:
    return sampler(sampler.guide(logits.float(), guides) if sampler.guided else logits, noise)


@torch.inference_mode()
def decode(
    model: Model,
    labels: Tensor,
    noise: Tensor,
    cache: Cache | Schedule,
    sampler: Sampler | None = None,
    *,
    engine: str = "lean",
    storage: torch.dtype | None = None,
    prompt: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draw one image per row.

    Args:
        model: see `Decoder`.
        labels: `(B,)`, class numbers; the null class draws without a condition.
        noise: `(B, N)`, uniform float64, one number per token.
        cache: see `Decoder`.
        sampler: see `Decoder`.
        engine: see `Decoder`.
        storage: see `Decoder`.
        prompt: codes `(B, n)` of the first tokens, to be completed; they count against the cache as
            any token does.
        watch: called after every step, with the step and the state, by instruments.

    Returns:
        Codes `(B, N)` in raster order.

    Raises:
        FewlinesError: labels out of range, or a prompt of other images or of too many tokens.
    """
    spec = model.spec
    if not model.caption_dim:
        labels = read_labels(labels, model)
    labels = labels.to(model.device)
    prompt = read_prompt(prompt, len(labels), spec).to(model.device)
    first = prompt.shape[1]
    if first and not model.raster:
        raise FewlinesError(
            f"prompt: {model.name} does not draw line by line, so it completes no image"
        )
    codes = torch.empty(len(labels), spec.n_tokens, dtype=torch.long, device=labels.device)
    with torch.cuda.device_of(labels):  # where kernels start and graphs are captured
        decoder = Decoder(model, len(labels), cache, sampler, engine, storage)
        for step in range(spec.n_tokens):
            codes[:, step] = (
                decoder.step(step - 1, codes[:, step - 1], noise[:, step])
                if step
                else decoder.start(labels, noise[:, 0])
            )
            if step < first:
                codes[:, step] = prompt[:, step]
            if watch:
                watch(step, decoder.state)
    if first < spec.n_tokens and int(codes.max()) == spec.codes:
        raise FewlinesError(
            "generate: the model's logits are not finite; its weights are damaged, or its numbers "
            "leave the range of this precision: try float32"
        )
    return codes if model.raster else codes[:, model.order.argsort().to(codes.device)]


def generate(
    model: Model,
    labels: int | Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor | Sequence[Tensor],
    cache: Cache | Schedule,
    seed: int = 0,
    *,
    first: int = 0,
    batch: int = 64,
    sampler: Sampler | None = None,
    precision: torch.dtype | None = None,
    storage: torch.dtype | None = None,
    prompt: Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]] | Tensor | None = None,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images; the same seed and number give the same image whatever the batch.

    Args:
        model: whose images they are.
        labels: class numbers, one or `(n,)`; the null class, `model.null_class`, draws without a
            class. Of a model that draws from captions, their features: `(n, tokens, F)`, or a list
            of `(tokens, F)`.
        cache: what is retained: `fewlines.cache(…)` or `fewlines.load_schedule(…)`.
        seed: of the noise.
        first: number of the first image.
        batch: images decoded together.
        sampler: from logits to codes; plain sampling where None.
        precision: of the matrix products; the model's own where None.
        storage: what keys and values are kept in; the model's own precision where None.
        prompt: codes `(n, k)` of the first tokens of each image, to be completed.
        done: told how many images have been drawn, batch by batch.

    Returns:
        Codes `(n, N)`; `tokenizer.decode(codes.unflatten(1, grid))` makes pictures of them.

    Raises:
        FewlinesError: an argument that is not what it should be, a cache that this model cannot
            have, or logits that are not finite.
    """
    spec = model.spec
    conditions = read_conditions(labels, model)
    begun, images = read_prompt(prompt, len(conditions), spec), len(conditions)
    seed, first = read_count(seed, "seed", 0), read_count(first, "first", 0)
    batch = read_count(batch, "batch", 1)
    for name, dtype in (("precision", precision), ("storage", storage)):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
            raise FewlinesError(f"{name}: {dtype} is not one of {', '.join(map(str, FLOATS))}")
    if images == 0:
        return torch.empty(0, spec.n_tokens, dtype=torch.long)
    if model.device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        storage = storage or model.dtype  # processors multiply those numbers as float32
        model = copy.deepcopy(model).float()
    if isinstance(cache, Schedule):
        cache.check_weights(model)
    limited = cache.slug != "full"
    if limited and isinstance(model, AttentionModel) and cache.plan(model.geometry).is_full:
        print(
            f"{cache.slug}: the budget holds all {spec.n_tokens} tokens of an image; "
            "this is the full cache",
            file=sys.stderr,
        )
    guided = sampler is not None and sampler.guided
    ready = model.prepare(precision or model.dtype, min(batch, images) * (1 + guided))
    codes = torch.empty(images, spec.n_tokens, dtype=torch.long, device=model.device)
    for of_group, given, numbers in ready.group(conditions):
        for rows, places in zip(given.split(batch), numbers.split(batch), strict=True):
            noise = draw_noise(seed, (first + places).tolist(), spec.n_tokens).to(model.device)
            start = begun[places]
            codes[places.to(model.device)] = decode(
                of_group, rows, noise, cache, sampler, storage=storage, prompt=start
            )
            if done:
                done(len(rows))
    return codes
