"""The one decode loop, for every cache: a token a step, through a bounded buffer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fewlines.cache.buffer import BoundedCache, Engine
from fewlines.cache.placement import Cache
from fewlines.cache.schedule import Schedule
from fewlines.errors import FewlinesError
from fewlines.generate.graphs import GraphedSteps
from fewlines.generate.packed import prepare
from fewlines.generate.sampler import Sampler, draw_noise
from fewlines.models.transformer import Transformer

Watch = Callable[[int, BoundedCache], None]


class Decoder:
    """A batch being drawn, a token a step.

    Args:
        model: as it is, or `prepare`d, which is faster.
        rows: images of the batch.
        cache: what stays resident.
        engine: how a full cache is read, see `BoundedCache`.
        storage: what keys and values are kept in; the model's own precision where None.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        cache: Cache | Schedule,
        sampler: Sampler | None = None,
        engine: Engine = "lean",
        storage: torch.dtype | None = None,
    ) -> None:
        self.model, self.sampler = model, sampler or Sampler()
        shape, weight = model.shape, model.norm.weight
        self.buffers = BoundedCache(
            cache.place(shape.geometry),
            rows * (1 + self.sampler.guided),
            shape.head_dim,
            storage or weight.dtype,
            weight.device,
            engine,
        )
        # Not a bound method: a decoder in a cycle would be freed by the collector, at any moment.
        self.advance = partial(_advance, model, self.buffers, self.sampler)
        self.graphs = None
        if weight.device.type == "cuda" and engine == "lean":
            self.graphs = GraphedSteps(self.advance, self.buffers, rows, weight.device)

    def start(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Class numbers and noise `(B,)` → the first codes `(B,)`."""
        if self.sampler.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.model.null_class)])
        logits = self.model(self.model.embed_labels(labels), 0, self.buffers)
        return _draw(self.sampler, logits, noise)

    def step(self, step: int, codes: Tensor, noise: Tensor) -> Tensor:
        """The codes `(B,)` of image token `step` → those of the next, valid until the next call."""
        self.buffers.turn(step)
        if self.graphs:
            return self.graphs(codes, noise)
        return self.advance(codes, self.buffers.position, noise)


def _advance(
    model: Transformer,
    buffers: BoundedCache,
    sampler: Sampler,
    codes: Tensor,
    position: int | Tensor,
    noise: Tensor,
) -> Tensor:
    codes = torch.cat([codes, codes]) if sampler.guided else codes
    x = model.embed_codes(codes[:, None])
    return _draw(sampler, model(x, position, buffers), noise)


def _draw(sampler: Sampler, logits: Tensor, noise: Tensor) -> Tensor:
    logits = logits[:, -1].float()
    return sampler(sampler.guide(logits) if sampler.guided else logits, noise)


@torch.inference_mode()
def decode(
    model: Transformer,
    labels: Tensor,
    noise: Tensor,
    cache: Cache | Schedule,
    sampler: Sampler | None = None,
    *,
    engine: Engine = "lean",
    storage: torch.dtype | None = None,
    given: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draw one image per row.

    Args:
        labels: `(B,)`, class numbers; the null class draws without a condition.
        noise: `(B, N)`, uniform float64, one number per token.
        given: codes `(B, n)` of the first tokens, to be completed; they count against the cache as
            any token does.
        watch: called after every step, with the step and the buffers, by instruments.
        model, cache, sampler, engine, storage: see `Decoder`.

    Returns:
        Codes `(B, N)` in raster order.
    """
    classes = model.shape.classes
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise FewlinesError(f"labels must lie in 0 … {classes} ({classes}: no class)")
    decoder = Decoder(model, len(labels), cache, sampler, engine, storage)
    n_tokens = model.shape.geometry.n_tokens
    codes = torch.empty(len(labels), n_tokens, dtype=torch.long, device=labels.device)
    first = 0 if given is None else given.shape[1]
    if given is not None and (len(given) != len(labels) or first > n_tokens):
        raise FewlinesError(
            f"given: {len(given)} images of {first} tokens; there are {len(labels)} labels, and an "
            f"image has {n_tokens} tokens"
        )
    for step in range(n_tokens):
        codes[:, step] = (
            decoder.step(step - 1, codes[:, step - 1], noise[:, step])
            if step
            else decoder.start(labels, noise[:, 0])
        )
        if given is not None and step < first:
            codes[:, step] = given[:, step]
        if watch:
            watch(step, decoder.buffers)
    return codes


def generate(
    model: Transformer,
    labels: Sequence[int] | Tensor,
    cache: Cache | Schedule,
    seed: int = 0,
    *,
    first: int = 0,
    batch: int = 64,
    sampler: Sampler | None = None,
    precision: torch.dtype | None = None,
    storage: torch.dtype | None = None,
    given: Tensor | None = None,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Images of these classes, numbered from `first`; the same seed and number give the same
    image whatever the batch.

    Args:
        precision: of the matrix products; the model's own where None.
        storage: what keys and values are kept in; the model's own precision where None.
        given: codes `(B, n)` of the first tokens of each image, to be completed.

    Returns:
        Codes `(B, N)`; `tokenizer.decode(codes.unflatten(1, grid))` makes pictures of them.
    """
    geometry = model.shape.geometry
    if cache.slug != "full" and cache.place(geometry).is_full:
        print(
            f"{cache.slug}: the budget holds all {geometry.n_tokens} tokens of an image; "
            "this is the full cache",
            file=sys.stderr,
        )
    weight = model.norm.weight
    guided = sampler is not None and sampler.guided
    ready = prepare(model, precision or weight.dtype, min(batch, len(labels)) * (1 + guided))
    parts = []
    labels = torch.as_tensor(labels, device=weight.device)
    begun = labels.new_empty(len(labels), 0) if given is None else given.to(weight.device)
    for rows, start in zip(labels.split(batch), begun.split(batch), strict=True):
        noise = draw_noise(seed, range(first, first + len(rows)), geometry.n_tokens)
        noise = noise.to(weight.device)
        parts.append(decode(ready, rows, noise, cache, sampler, storage=storage, given=start))
        first += len(rows)
        if done:
            done(len(rows))
    return torch.cat(parts)
