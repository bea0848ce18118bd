"""Teacher-forced likelihood under a cache, paired with that of the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from fewlines.attention.teacher_forced import Limits
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.spec import Cache, make_cache
from fewlines.calibration.capture import capture_attention
from fewlines.decode.loop import decode
from fewlines.decode.sampler import Sampler
from fewlines.models.base import AttentionModel, Model


@dataclass(frozen=True)
class Likelihood:
    """What was measured of each image, in nats/token.

    Attributes:
        nll: `(n,)`, under the cache.
        nll_full: `(n,)`, under the full cache.
        kl: `(n, N)`, KL(full ‖ cache) at every token; NaN at tokens that were known.
        delta: `(n, N)`, what the cache adds to the NLL of every token; likewise.
        grid: `(h, w)` of them.
    """

    nll: Tensor
    nll_full: Tensor
    kl: Tensor
    delta: Tensor
    grid: tuple[int, int]

    def average_by_line(self, of_tokens: Tensor) -> Tensor:
        """Average `kl` or `delta` over images and columns, `(h,)`; NaN of lines that were known."""
        by_line: Tensor = of_tokens.unflatten(1, self.grid).double().mean((0, 2))
        return by_line

    def summarise(self) -> dict[str, Any]:
        """Summarise it as files hold it: means, the interval of the paired difference, what falls
        on each line, and the NLL of each image."""
        return {
            "images": len(self.nll),
            "nll": self.nll.mean().item(),
            **name_interval("nll_delta", self.nll - self.nll_full),
            "kl": self.kl.double().nanmean().item(),
            "kl_by_line": _list_known(self.average_by_line(self.kl)),
            "nll_delta_by_line": _list_known(self.average_by_line(self.delta)),
            "nll_of_images": self.nll.tolist(),
        }


def _list_known(of_lines: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else value for value in of_lines.tolist()]


@torch.inference_mode()
def measure_likelihoods(
    model: Model,
    labels: Tensor,
    codes: Tensor,
    caches: Sequence[Cache],
    batch: int,
    done: Callable[[int], object] = lambda images: None,
    prompt: int = 0,
) -> list[Likelihood]:
    """Measure the likelihood under each cache, limited exactly as in sampling; the full cache's
    forward, which all are compared with, runs once.

    Args:
        model: whose likelihood it is.
        labels: class numbers `(n,)`.
        codes: `(n, N)`.
        caches: each what is retained.
        batch: images of a forward.
        done: told of every batch under every cache.
        prompt: so many first tokens are known; the likelihood is that of the others.
    """
    forwards = [_make_forward(model, cache) for cache in caches]
    nll_full: list[Tensor] = []
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in caches]
    parts = (x.to(model.device).split(batch) for x in (labels, codes.long()))
    for rows, truth in zip(*parts, strict=True):
        full = model.teacher_forced(rows, truth).float().log_softmax(-1)  # (B, N, V)
        of_full = _nll(full, truth)
        nll_full.append(of_full[:, prompt:].mean(-1))
        for forward, of_cache in zip(forwards, found, strict=True):
            if forward is None:
                nothing = torch.zeros_like(of_full)
                of_cache.append((nll_full[-1], nothing.float(), nothing))
            else:
                under = forward(rows, truth).float().log_softmax(-1)
                kl = F.kl_div(under, full, reduction="none", log_target=True).sum(-1)
                nll = _nll(under, truth)
                of_cache.append((nll[:, prompt:].mean(-1), kl, nll - of_full))
            done(len(rows))
    against = torch.cat(nll_full).cpu()
    joined = [[_join(parts) for parts in zip(*of_cache, strict=True)] for of_cache in found]
    for _, *of_tokens in joined:
        for each in of_tokens:
            each[:, :prompt] = torch.nan
    grid = model.spec.grid
    return [Likelihood(nll, against, kl, delta, grid) for nll, kl, delta in joined]


def measure_likelihood(
    model: Model, labels: Tensor, codes: Tensor, cache: Cache, batch: int, **how: Any
) -> Likelihood:
    """Measure under one cache, as `measure_likelihoods` does."""
    return measure_likelihoods(model, labels, codes, [cache], batch, **how)[0]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts)).cpu()


def _make_forward(model: Model, cache: Cache) -> Callable[[Tensor, Tensor], Tensor] | None:
    """How logits `(B, N, V)` of codes `(B, N)` are had under this cache; None where it is full."""
    if isinstance(model, AttentionModel):
        plan = cache.plan(model.geometry)
        if plan.oracle is not None:
            return partial(forward_oracle, model, plan=plan)
    memory = model.limit(cache)
    return None if memory is None else partial(model.teacher_forced, memory=memory)


def forward_oracle(
    model: AttentionModel, labels: Tensor, codes: Tensor, plan: EvictionPlan
) -> Tensor:
    """Predict under a policy that is applied to the finished image.

    Args:
        model: whose predictions they are.
        labels: class numbers `(B,)`.
        codes: `(B, N)`.
        plan: of a cache with an `OraclePolicy`.

    Returns:
        Logits `(B, N, V)`.
    """
    assert plan.oracle is not None
    limits = []
    for layer, seen in enumerate(capture_attention(model, labels, codes)):
        given = (seen.cpu(), torch.from_numpy(plan.capacity[layer]))
        evicted_at, unread = plan.oracle.find_evictions(*given), plan.oracle.find_unread(*given)
        merge_slots = int(plan.merge_slots[layer, 0])
        limits.append(Limits(evicted_at, plan, merge_slots, seen.dtype, seen.device, unread))
    return model.teacher_forced(labels, codes, lambda layer, q, k, v: limits[layer].attend(q, k, v))


def predict_by_steps(
    model: Model,
    labels: Tensor,
    codes: Tensor,
    cache: Cache,
    storage: torch.dtype = torch.float32,
) -> Tensor:
    """Predict by the decode loop itself, a token a step.

    Args:
        model: whose predictions they are.
        labels: class numbers `(B,)`.
        codes: `(B, N)`.
        cache: what is retained.
        storage: what keys and values are kept in.

    Returns:
        Logits `(B, N, V)`.
    """
    state = model.prepare(model.dtype, len(labels)).begin(len(labels), cache, storage=storage)
    logits = [state.start(labels)]
    for step, code in enumerate(codes[:, model.order][:, :-1].unbind(1)):
        logits.append(state.step(step, code))
    return torch.stack(logits, dim=1)[:, model.order.argsort()]


@dataclass(frozen=True)
class Agreement:
    """How far a full cache stored in 16 bits agrees with one in float32.

    Attributes:
        nll_delta: `(n,)`, nats/token more than with float32, on images `n`.
        equal_tokens: share of equal greedy codes, from the first to the last.
        equal_before: share of the image drawn before the first unequal code, mean.
    """

    nll_delta: Tensor
    equal_tokens: float
    equal_before: float


@torch.inference_mode()
def compare_storages(
    model: Model, labels: Tensor, codes: Tensor, storages: Sequence[torch.dtype]
) -> list[Agreement]:
    """Compare each storage with float32: teacher-forced, and drawing an image of each label
    greedily.

    Args:
        model: with a full cache.
        labels: class numbers `(n,)`.
        codes: `(n, N)`.
        storages: that keys and values are kept in.
    """
    full, device = make_cache("full"), model.device
    labels, truth = labels.to(device), codes.long().to(device)
    ready = model.prepare(torch.float32, len(labels))
    middle = torch.full(truth.shape, 0.5, dtype=torch.float64, device=device)

    def run(storage: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = predict_by_steps(model, labels, truth, full, storage)
        drawn = decode(ready, labels, middle, full, Sampler(top_k=1), storage=storage)
        return _nll(logits.float().log_softmax(-1), truth).mean(-1), drawn

    nll, drawn = run(torch.float32)
    found = []
    for stored_nll, stored in map(run, storages):
        equal = stored == drawn
        agreeing = (equal.float().mean().item(), equal.cumprod(-1).float().mean().item())
        found.append(Agreement(stored_nll - nll, *agreeing))
    return found


def _nll(log_probabilities: Tensor, codes: Tensor) -> Tensor:
    """Nats of every token, `(B, N)` float64."""
    return -log_probabilities.gather(-1, codes[..., None]).squeeze(-1).double()


def name_interval(name: str, difference: Tensor) -> dict[str, float]:
    """Name the ends of `pair_interval` as tables do: `{name, name_low, name_high}`."""
    ends = (name, f"{name}_low", f"{name}_high")
    return dict(zip(ends, pair_interval(difference), strict=True))


def pair_interval(difference: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """Average paired differences `(n,)`, with the two-sided t interval: `(mean, low, high)`."""
    mean, n = difference.mean().item(), len(difference)
    error = difference.std().item() / n**0.5
    reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return mean, mean - reach, mean + reach
