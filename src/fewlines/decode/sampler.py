"""From logits to codes, by noise that belongs to the image and not to the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewlines import machine
from fewlines.models.base import CHUNK
from fewlines.schema import Count, Mass, Number, check_fields


@dataclass(frozen=True)
class Sampler:
    """How codes are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest code, whatever the noise.
        top_k: keeps so many of the likeliest codes; 0 keeps all.
        top_p: keeps the likeliest codes of this mass; 1 keeps all.
        guidance: scale of classifier-free guidance; 1 is none.
        guided_tokens: guides so many first tokens of an image, LlamaGen's `cfg_interval` and two
            more; 0 guides all.

    Raises:
        FewlinesError: a value that is out of its range.
    """

    temperature: Number = 1.0
    top_k: Count = 0
    top_p: Mass = 1.0
    guidance: Number = 1.0
    guided_tokens: Count = 0

    def __post_init__(self) -> None:
        """Refuse values out of their ranges."""
        check_fields(self, "sampler")

    @property
    def guided(self) -> bool:
        """Whether every image takes a second row, without its class."""
        return self.guidance != 1

    @property
    def is_plain(self) -> bool:
        """Whether no code is left out."""
        return self.top_k == 0 and self.top_p == 1

    def guides(self, token: int) -> bool:
        """Whether the logits of image token `token` are guided."""
        return self.guided and not 0 < self.guided_tokens <= token

    def guide(self, logits: Tensor, guides: bool = True) -> Tensor:
        """Guide: logits of conditional and then unconditional rows `(2B, V)` → `(B, V)`; where not
        `guides`, the conditional ones as they are."""
        conditional, unconditional = logits.chunk(2)
        if not guides:
            return conditional
        return unconditional + (conditional - unconditional) * float(self.guidance)

    def __call__(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Draw by inverting the cumulative distribution.

        Args:
            logits: `(B, V)`.
            noise: `(B,)`, uniform in [0, 1), float64.

        Returns:
            Codes `(B,)`; `V`, which is none, where the logits are not finite.
        """
        if logits.device.type == "cpu" and len(logits) > CHUNK:
            parts = zip(logits.split(CHUNK), noise.split(CHUNK), strict=True)
            return torch.cat([self(*part) for part in parts])
        if self.temperature == 0:
            best, codes = logits.max(-1)
            return codes.masked_fill(~best.isfinite(), logits.shape[-1])
        if self.is_plain and logits.device.type == "cuda" and machine.has_triton():
            from fewlines.decode.triton_sampler import draw

            return draw(logits, float(self.temperature), noise)
        temperature = float(self.temperature)  # whole numbers may be larger than torch takes
        logits = logits.float() / temperature
        if 0 < self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, codes = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(-1, codes, ordered)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        target = noise[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def draw_noise(seed: int, images: Sequence[int], n_tokens: int) -> Tensor:
    """Draw uniform noise `(B, N)` float64: that of an image is the same in every batch, shard and
    cache.

    Args:
        seed: of all images.
        images: their numbers.
        n_tokens: of an image.
    """
    rows = [np.random.default_rng([seed, image]).random(n_tokens) for image in images]
    return torch.from_numpy(np.stack(rows))
