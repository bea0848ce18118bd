"""Pixels as tokens, as PixelRNN (arXiv 1601.06759) and its successors model them: the grey levels
of an image. Nothing is trained and, of 256 levels, nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.models.tokenizer import Tokenizer
from fewlines.schema import Levels, Positive, check_fields


@dataclass(frozen=True)
class PixelShape:
    """Attributes: `channels` of an image, `codes`, the levels that tokens tell apart; a token is a
    pixel, so its side has a `stride` of one."""

    channels: Positive
    codes: Levels
    stride: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        check_fields(self, "tokenizer")
        if self.channels != 1:
            raise FewlinesError(
                f"tokenizer.levels: images of {self.channels} channels; the tokens of a pixel are "
                "its grey level, so leave levels out and train a tokenizer"
            )


class PixelTokenizer(Tokenizer):
    """Grey levels, each for an equal share of the 256."""

    name = "pixels"
    Shape = PixelShape
    shape: PixelShape
    levels: Tensor

    def __init__(self, shape: PixelShape) -> None:
        super().__init__()
        self.shape = shape
        middle = (torch.arange(shape.codes) + 0.5) * 256 / shape.codes - 0.5  # 0 … 255
        self.register_buffer("levels", middle / 127.5 - 1)

    @property
    def device(self) -> torch.device:
        """Where its levels lie."""
        return self.levels.device

    def find_codes(self, images: Tensor) -> Tensor:
        """Encode images `(B, 1, H, W)` in [−1, 1] → levels `(B, H, W)`."""
        grey = ((images[:, 0] + 1) * 127.5).round().long()  # 0 … 255
        return (2 * grey + 1) * self.shape.codes // 512

    def draw_images(self, indices: Tensor) -> Tensor:
        """Decode levels `(B, H, W)` → images `(B, 1, H, W)`, the middle of each level."""
        return self.levels[indices][:, None]
