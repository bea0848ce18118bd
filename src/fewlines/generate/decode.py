"""The one decode loop, for every cache: a token a step, through a bounded buffer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewlines.cache.buffer import BoundedCache, Engine
from fewlines.cache.placement import Cache
from fewlines.errors import FewlinesError
from fewlines.generate.packed import prepare
from fewlines.generate.sampler import Sampler, draw_noise
from fewlines.models.transformer import Transformer

Watch = Callable[[int, BoundedCache], None]


@torch.inference_mode()
def decode(
    model: Transformer,
    labels: Tensor,
    noise: Tensor,
    cache: Cache,
    sampler: Sampler | None = None,
    *,
    engine: Engine = "lean",
    storage: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draw one image per row.

    Args:
        model: as it is, or `prepare`d, which is faster.
        labels: `(B,)`, class numbers; the null class draws without a condition.
        noise: `(B, N)`, uniform float64, one number per token.
        cache: what stays resident.
        engine: how a full cache is read, see `BoundedCache`.
        storage: what keys and values are kept in; the model's own precision where None.
        watch: called after every step, with the step and the buffers, by instruments.

    Returns:
        Codes `(B, N)` in raster order.
    """
    sampler = sampler or Sampler()
    shape, weight = model.shape, model.norm.weight
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= shape.classes:
        raise FewlinesError(f"labels must lie in 0 … {shape.classes} ({shape.classes}: no class)")
    n_tokens = shape.geometry.n_tokens
    guided = sampler.guidance != 1
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    buffers = BoundedCache(
        cache.place(shape.geometry),
        len(rows),
        shape.head_dim,
        storage or weight.dtype,
        weight.device,
        engine,
    )
    codes = torch.empty(len(labels), n_tokens, dtype=torch.long, device=weight.device)
    x = model.embed_labels(rows)
    for step in range(n_tokens):
        logits = model(x, buffers.position, buffers)[:, -1].float()
        logits = sampler.guide(logits) if guided else logits
        codes[:, step] = sampler(logits, noise[:, step])
        if watch:
            watch(step, buffers)
        if step + 1 < n_tokens:
            drawn = codes[:, step : step + 1]
            x = model.embed_codes(torch.cat([drawn, drawn]) if guided else drawn)
    return codes


def generate(
    model: Transformer,
    labels: Sequence[int] | Tensor,
    cache: Cache,
    seed: int = 0,
    *,
    first: int = 0,
    batch: int = 64,
    sampler: Sampler | None = None,
    precision: torch.dtype | None = None,
    storage: torch.dtype | None = None,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Images of these classes, numbered from `first`; the same seed and number give the same
    image whatever the batch.

    Args:
        precision: of the matrix products; the model's own where None.
        storage: what keys and values are kept in; the model's own precision where None.

    Returns:
        Codes `(B, N)`; `tokenizer.decode(codes.unflatten(1, grid))` makes pictures of them.
    """
    geometry = model.shape.geometry
    if cache.budget is not None and cache.place(geometry).is_full:
        print(
            f"{cache.slug}: the budget holds all {geometry.n_tokens} tokens of an image; "
            "this is the full cache",
            file=sys.stderr,
        )
    weight = model.norm.weight
    guided = sampler is not None and sampler.guidance != 1
    ready = prepare(model, precision or weight.dtype, min(batch, len(labels)) * (1 + guided))
    parts = []
    for rows in torch.as_tensor(labels, device=weight.device).split(batch):
        noise = draw_noise(seed, range(first, first + len(rows)), geometry.n_tokens)
        noise = noise.to(weight.device)
        parts.append(decode(ready, rows, noise, cache, sampler, storage=storage))
        first += len(rows)
        if done:
            done(len(rows))
    return torch.cat(parts)
