"""The one decode loop, for every cache and every family: a token a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.decode.graphs import GraphedSteps
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.errors import FewlinesError
from fewlines.models.base import AttentionModel, Model, State

Watch = Callable[[int, State], None]


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
            cache: what stays resident.
            sampler: from logits to codes.
            engine: how a full cache is read, one of the model's `engines`.
            storage: what keys and values are kept in; the model's own precision where None.
        """
        self.model, self.sampler = model, sampler or Sampler()
        rows_of_model = rows * (1 + self.sampler.guided)
        self.state = model.begin(rows_of_model, cache, storage=storage, engine=engine)
        # Not a bound method: a decoder in a cycle would be freed by the collector, at any moment.
        self.draw_next = partial(_draw_next, self.state, self.sampler)
        self.graphs = None
        if model.device.type == "cuda" and model.has_kv_cache and engine == "lean":
            self.graphs = GraphedSteps(self.draw_next, self.state, rows, model.device)

    def start(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Draw the first codes `(B,)` of class numbers and noise `(B,)`."""
        if self.sampler.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.model.null_class)])
        return _draw(self.sampler, self.state.start(labels), noise)

    def step(self, step: int, codes: Tensor, noise: Tensor) -> Tensor:
        """Read the codes `(B,)` of image token `step` and draw the next, valid until the next
        call, by noise `(B,)`."""
        self.state.advance(step)
        if self.graphs:
            return self.graphs(codes, noise)
        return self.draw_next(codes, self.state.position, noise)


def _draw_next(
    state: State, sampler: Sampler, codes: Tensor, position: int | Tensor, noise: Tensor
) -> Tensor:
    codes = torch.cat([codes, codes]) if sampler.guided else codes
    return _draw(sampler, state.forward(codes, position), noise)


def _draw(sampler: Sampler, logits: Tensor, noise: Tensor) -> Tensor:
    logits = logits.float()
    return sampler(sampler.guide(logits) if sampler.guided else logits, noise)


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
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= spec.classes:
        raise FewlinesError(f"labels must lie in 0 … {spec.classes} ({spec.classes}: no class)")
    first = 0 if prompt is None else prompt.shape[1]
    if prompt is not None and (len(prompt) != len(labels) or first > spec.n_tokens):
        raise FewlinesError(
            f"prompt: {len(prompt)} images of {first} tokens; there are {len(labels)} labels, and "
            f"an image has {spec.n_tokens} tokens"
        )
    decoder = Decoder(model, len(labels), cache, sampler, engine, storage)
    codes = torch.empty(len(labels), spec.n_tokens, dtype=torch.long, device=labels.device)
    for step in range(spec.n_tokens):
        codes[:, step] = (
            decoder.step(step - 1, codes[:, step - 1], noise[:, step])
            if step
            else decoder.start(labels, noise[:, 0])
        )
        if prompt is not None and step < first:
            codes[:, step] = prompt[:, step]
        if watch:
            watch(step, decoder.state)
    return codes


def generate(
    model: Model,
    labels: Sequence[int] | Tensor,
    cache: Cache | Schedule,
    seed: int = 0,
    *,
    first: int = 0,
    batch: int = 64,
    sampler: Sampler | None = None,
    precision: torch.dtype | None = None,
    storage: torch.dtype | None = None,
    prompt: Tensor | None = None,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images; the same seed and number give the same image whatever the batch.

    Args:
        model: whose images they are.
        labels: class numbers `(n,)`; the null class, `model.null_class`, draws without a class.
        cache: what stays resident: `fewlines.cache(…)` or `fewlines.load_schedule(…)`.
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
        FewlinesError: a cache that this model cannot have, or what `decode` refuses.
    """
    spec = model.spec
    limited = cache.slug != "full"
    if limited and isinstance(model, AttentionModel) and cache.plan(model.geometry).is_full:
        print(
            f"{cache.slug}: the budget holds all {spec.n_tokens} tokens of an image; "
            "this is the full cache",
            file=sys.stderr,
        )
    guided = sampler is not None and sampler.guided
    ready = model.prepare(precision or model.dtype, min(batch, len(labels)) * (1 + guided))
    parts = []
    labels = torch.as_tensor(labels, device=model.device)
    begun = labels.new_empty(len(labels), 0) if prompt is None else prompt.to(model.device)
    for rows, start in zip(labels.split(batch), begun.split(batch), strict=True):
        noise = draw_noise(seed, range(first, first + len(rows)), spec.n_tokens)
        noise = noise.to(model.device)
        parts.append(decode(ready, rows, noise, cache, sampler, storage=storage, prompt=start))
        first += len(rows)
        if done:
            done(len(rows))
    return torch.cat(parts)
