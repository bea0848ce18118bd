"""Teacher-forced likelihood under a cache, paired with that of the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from fewlines.cache.buffer import BoundedCache
from fewlines.cache.line_parallel import attention_under
from fewlines.cache.placement import Cache, Placement
from fewlines.cache.placement import cache as make_cache
from fewlines.cache.teacher import Limits
from fewlines.generate.decode import decode
from fewlines.generate.packed import prepare
from fewlines.generate.sampler import Sampler
from fewlines.measure.attention import attention_of
from fewlines.models.transformer import Transformer


@dataclass(frozen=True)
class Likelihood:
    """Per image, in nats/token: `nll` under the cache, `nll_full` under the full cache, both
    `(n,)`; `kl` `(n, N)` is KL(full ‖ cache) at every token of a grid."""

    nll: Tensor
    nll_full: Tensor
    kl: Tensor
    grid: tuple[int, int]

    def kl_by_line(self) -> Tensor:
        """`(h,)`, mean over images and columns."""
        by_line: Tensor = self.kl.unflatten(1, self.grid).double().mean((0, 2))
        return by_line


@torch.inference_mode()
def measure_likelihood(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    cache: Cache,
    batch: int,
    done: Callable[[int], object] = lambda images: None,
    given: int = 0,
) -> Likelihood:
    """Likelihood of `codes` `(n, N)` with the cache limited exactly as in sampling; of an image
    whose first `given` tokens are known, that of the others."""
    placement, device = cache.place(model.shape.geometry), model.norm.weight.device
    forward = None if placement.is_full else _forward(placement, device)
    nll, nll_full, kl = [], [], []
    parts = (x.to(device).split(batch) for x in (labels, codes.long()))
    for rows, truth in zip(*parts, strict=True):
        full = model.teacher_forced(rows, truth).float().log_softmax(-1)  # (B, N, V)
        nll_full.append(_nll(full[:, given:], truth[:, given:]))
        if forward is None:
            nll.append(nll_full[-1])
            kl.append(torch.zeros_like(truth, dtype=torch.float32))
        else:
            under = forward(model, rows, truth).float().log_softmax(-1)
            nll.append(_nll(under[:, given:], truth[:, given:]))
            kl.append(F.kl_div(under, full, reduction="none", log_target=True).sum(-1))
        done(len(rows))
    under, against, divergence = (torch.cat(each).cpu() for each in (nll, nll_full, kl))
    return Likelihood(under, against, divergence, model.shape.grid)


def _forward(
    placement: Placement, device: torch.device
) -> Callable[[Transformer, Tensor, Tensor], Tensor]:
    """How logits `(B, N, V)` of codes `(B, N)` are had under this cache."""
    if placement.hindsight is not None:
        return partial(in_hindsight, placement=placement)
    attend = attention_under(placement, device)
    return lambda model, labels, codes: model.teacher_forced(labels, codes, attend)


def in_hindsight(model: Transformer, labels: Tensor, codes: Tensor, placement: Placement) -> Tensor:
    """Teacher-forced logits under a policy that is shown the finished image."""
    assert placement.hindsight is not None
    room = torch.from_numpy(placement.room)  # (L, H)
    limits = [
        Limits(
            placement.hindsight.evicted_at(seen.cpu(), room[layer]),
            placement,
            int(placement.summaries[layer, 0]),
            seen.dtype,
            seen.device,
        )
        for layer, seen in enumerate(attention_of(model, labels, codes))
    ]
    return model.teacher_forced(labels, codes, lambda layer, q, k, v: limits[layer].attend(q, k, v))


def step_by_step(
    model: Transformer,
    labels: Tensor,
    codes: Tensor,
    placement: Placement,
    storage: torch.dtype = torch.float32,
) -> Tensor:
    """Teacher-forced logits `(B, N, V)` by the decode loop itself, a token a step: for policies
    whose victims depend on the image."""
    model = prepare(model, model.norm.weight.dtype, len(labels))
    buffers = BoundedCache(placement, len(labels), model.shape.head_dim, storage, labels.device)
    x = model.embed_labels(labels)
    logits = [model(x, 0, buffers)[:, -1:]]
    for step, code in enumerate(codes[:, :-1].split(1, dim=1)):
        buffers.turn(step)
        logits.append(model(model.embed_codes(code), buffers.position, buffers))
    return torch.cat(logits, dim=1)


@dataclass(frozen=True)
class Agreement:
    """Of a full cache whose keys and values are kept in 16 bits with one in float32.

    Attributes:
        nll_delta: `(n,)`, nats/token more than with float32, on images `n`.
        equal_tokens: share of equal greedy codes, from the first to the last.
        equal_before: share of the image drawn before the first unequal code, mean.
    """

    nll_delta: Tensor
    equal_tokens: float
    equal_before: float


@torch.inference_mode()
def storage_agreement(
    model: Transformer, labels: Tensor, codes: Tensor, storages: Sequence[torch.dtype]
) -> list[Agreement]:
    """Of each storage with float32: teacher-forced on codes `(n, N)`, and drawing an image of each
    label greedily."""
    full = make_cache("full")
    placement, device = full.place(model.shape.geometry), model.norm.weight.device
    labels, truth = labels.to(device), codes.long().to(device)
    ready = prepare(model, torch.float32, len(labels))
    middle = torch.full(truth.shape, 0.5, dtype=torch.float64, device=device)

    def run(storage: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = step_by_step(model, labels, truth, placement, storage)
        drawn = decode(ready, labels, middle, full, Sampler(top_k=1), storage=storage)
        return _nll(logits.float().log_softmax(-1), truth), drawn

    nll, drawn = run(torch.float32)
    found = []
    for stored_nll, stored in map(run, storages):
        equal = stored == drawn
        agreeing = (equal.float().mean().item(), equal.cumprod(-1).float().mean().item())
        found.append(Agreement(stored_nll - nll, *agreeing))
    return found


def _nll(log_probabilities: Tensor, codes: Tensor) -> Tensor:
    chosen = log_probabilities.gather(-1, codes[..., None]).squeeze(-1)
    return -chosen.double().mean(-1)


def named_interval(name: str, difference: Tensor) -> dict[str, float]:
    """`paired_interval` as tables have it: `{name, name_low, name_high}`."""
    ends = (name, f"{name}_low", f"{name}_high")
    return dict(zip(ends, paired_interval(difference), strict=True))


def paired_interval(difference: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences `(n,)` and its two-sided t interval: `(mean, low, high)`."""
    mean, n = difference.mean().item(), len(difference)
    error = difference.std().item() / n**0.5
    if error == 0:
        return mean, mean, mean
    reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return mean, mean - reach, mean + reach
