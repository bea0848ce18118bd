"""Watch a cache work: one image as it is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewlines.cache.buffer import BoundedCache
from fewlines.cache.placement import Placement
from fewlines.cache.slots import RankedSlots
from fewlines.config import Experiment
from fewlines.generate.decode import decode
from fewlines.generate.packed import prepare
from fewlines.generate.sampler import draw_noise
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.models.transformer import Transformer
from fewlines.report.watch import Frame, Pixels, residents, write_animation, write_page
from fewlines.stages.samples import sampler


def watch(
    config: Experiment,
    model: Path,
    tokenizer: Path,
    cache: str,
    output: Path,
    page: Path | None = None,
    calibration: Path | None = None,
    seed: int = 0,
    label: int = 0,
    frames: int = 60,
) -> None:
    """Draw one image under a cache and under the full cache, with what each head still holds: an
    animated GIF, and perhaps an HTML page with a slider."""
    network, pictures = load_network(model, Transformer), load_network(tokenizer, Tokenizer)
    limited = config.cache(cache).calibrated(calibration)
    geometry = network.shape.geometry
    noise, labels = draw_noise(seed, [0], geometry.n_tokens), torch.tensor([label])
    ready, how = prepare(network, torch.float32, 1), sampler(config.sampling)
    steps = np.unique(np.linspace(0, geometry.n_tokens - 1, frames).round().astype(int)).tolist()
    evictions = _Evictions(limited.place(geometry))
    few = decode(ready, labels, noise, limited, how, watch=evictions.see)
    full = decode(ready, labels, noise, config.cache("full"), how)
    made = [
        Frame(
            step,
            _so_far(pictures, few, step, geometry.grid),
            _so_far(pictures, full, step, geometry.grid),
            residents(evictions.evicted_at, step, geometry.grid),
        )
        for step in steps
    ]
    write_animation(made, cache, output)
    if page:
        write_page(made, cache, page)


class _Evictions:
    """The step at which each token goes, `(L, H, N)`: known beforehand, or seen while drawing."""

    def __init__(self, placement: Placement) -> None:
        self.scored = placement.scoring is not None
        shape = (*placement.capacity.shape, placement.geometry.n_tokens)
        self.evicted_at = (
            np.full(shape, placement.geometry.n_tokens) if self.scored else placement.evicted_at
        )

    def see(self, step: int, buffers: BoundedCache) -> None:
        """After image token `step` was drawn; the newest that is written is the one before."""
        if not self.scored or step == 0:
            return
        for layer, groups in enumerate(buffers.layers):
            for group in groups:
                assert isinstance(group.slots, RankedSlots)
                for head, held in zip(group.heads, group.slots.positions[0].numpy(), strict=True):
                    goes = self.evicted_at[layer, head]
                    gone = np.setdiff1d(np.flatnonzero(goes[:step] > step), held)
                    goes[gone] = step - 1


def _so_far(tokenizer: Tokenizer, codes: Tensor, step: int, grid: tuple[int, int]) -> Pixels:
    """The picture `(H, W, 3)` of codes `(1, N)` up to `step`, the rest black."""
    picture = tokenizer.decode(codes.unflatten(1, grid))[0].permute(1, 2, 0)  # (H, W, C)
    drawn = (torch.arange(codes.shape[1]) <= step).view(grid)
    scale = picture.shape[0] // grid[0]
    mask = drawn.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    coloured = picture.expand(-1, -1, 3) * mask[..., None]
    return coloured.to(torch.uint8).numpy()
