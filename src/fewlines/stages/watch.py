"""Watch a cache work: one image as it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from fewlines.attention.slots import RankedSlots
from fewlines.cache.plan import EvictionPlan
from fewlines.config import Experiment
from fewlines.decode.loop import decode
from fewlines.decode.sampler import draw_noise
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.watch import Frame, Pixels, find_residents, write_animation, write_page
from fewlines.stages.samples import make_sampler


def watch(
    config: Experiment,
    model: Path,
    tokenizer: Path,
    cache: str,
    output: Path,
    page: Path | None = None,
    calibration: Path | None = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    label: Annotated[int, typer.Option(min=0, help="class of the image")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="of the animation")] = 60,
) -> None:
    """Draw one image under a cache and under the full cache, with what each head still holds: an
    animated GIF, and perhaps an HTML page with a slider.

    Args:
        config: the experiment.
        model: weights.
        tokenizer: its weights.
        cache: its name in the experiment.
        output: GIF to write.
        page: HTML to write.
        calibration: of the base model, for caches that go by one.
        seed: of the noise.
        label: class of the image.
        frames: of the animation.
    """
    network, pictures = load_network(model, AttentionModel), load_network(tokenizer, Tokenizer)
    limited = config.get_cache(cache).calibrated(calibration)
    geometry = network.geometry
    noise, labels = draw_noise(seed, [0], geometry.n_tokens), torch.tensor([label])
    ready, how = network.prepare(torch.float32, 1), make_sampler(config.sampling)
    steps = np.unique(np.linspace(0, geometry.n_tokens - 1, frames).round().astype(int)).tolist()
    evictions = _Evictions(limited.plan(geometry))
    few = decode(ready, labels, noise, limited, how, watch=evictions.see)
    full = decode(ready, labels, noise, config.get_cache("full"), how)
    made = [
        Frame(
            step,
            _so_far(pictures, few, step, geometry.grid),
            _so_far(pictures, full, step, geometry.grid),
            find_residents(evictions.evicted_at, step, geometry.grid),
        )
        for step in steps
    ]
    write_animation(made, cache, output)
    if page:
        write_page(made, cache, page)


class _Evictions:
    """The step at which each token is evicted, `(L, H, N)`: known beforehand, or seen while
    drawing."""

    def __init__(self, plan: EvictionPlan) -> None:
        self.scored = plan.scoring is not None
        shape = (*plan.capacity.shape, plan.geometry.n_tokens)
        self.evicted_at = np.full(shape, plan.geometry.n_tokens) if self.scored else plan.evicted_at

    def see(self, step: int, state: Any) -> None:
        """Look after image token `step` was drawn; the newest that is written is the one before."""
        if not self.scored or step == 0:
            return
        for layer, groups in enumerate(state.buffers.layers):
            for group in groups:
                assert isinstance(group.slots, RankedSlots)
                for head, held in zip(group.heads, group.slots.positions[0].numpy(), strict=True):
                    evicted_at = self.evicted_at[layer, head]
                    victims = np.setdiff1d(np.flatnonzero(evicted_at[:step] > step), held)
                    evicted_at[victims] = step - 1


def _so_far(tokenizer: Tokenizer, codes: Tensor, step: int, grid: tuple[int, int]) -> Pixels:
    """The picture `(H, W, 3)` of codes `(1, N)` up to `step`, the rest black."""
    picture = tokenizer.decode(codes.unflatten(1, grid))[0].permute(1, 2, 0)  # (H, W, C)
    drawn = (torch.arange(codes.shape[1]) <= step).view(grid)
    scale = picture.shape[0] // grid[0]
    mask = drawn.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    coloured = picture.expand(-1, -1, 3) * mask[..., None]
    return coloured.to(torch.uint8).numpy()
