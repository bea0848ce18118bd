"""Codes of two levels (after VQ-VAE-2, arXiv 1906.00446), as many as of one.

Every second token of every second line is a code of the upper level, which sees twice as far; the
others are codes of the lower level, made given the upper ones, and both draw the image. So the
upper codes are what the family `hierarchical` draws first. VQ-VAE-2 has a lower code there as
well, and a codebook for each level.
"""

from __future__ import annotations

from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape


class TwoLevelTokenizer(ConvTokenizer):
    """A tokenizer of two levels, trained as `ConvTokenizer` is; grids have even sides."""

    name = "two-level"

    def __init__(self, shape: TokenizerShape) -> None:
        super().__init__(shape)
        width, code_dim = shape.widths[-1], shape.code_dim
        *below, self.lower = self.encoder
        self.encoder = nn.Sequential(*below)
        self.upper = nn.Sequential(
            nn.Conv2d(width, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, code_dim, 1)
        )
        self.given = nn.ConvTranspose2d(code_dim, code_dim, 4, 2, 1)  # to the lower codes
        self.drawn = nn.ConvTranspose2d(code_dim, code_dim, 4, 2, 1)  # to the decoder

    def compress(self, images: Tensor) -> Tensor:
        """Encode images: upper encodings at every second place of every second line."""
        features = _be_even(self.encoder(images))
        upper = self.upper(features)
        mixed: Tensor = self.lower(features) + self.given(self.quantizer(upper).codes)
        mixed[:, :, ::2, ::2] = upper
        return mixed

    def expand(self, codes: Tensor) -> Tensor:
        """Decode codes of both levels."""
        images: Tensor = self.decoder(_be_even(codes) + self.drawn(codes[:, :, ::2, ::2]))
        return images


def _be_even(grid: Tensor) -> Tensor:
    """Refuses `(B, D, h, w)` of an odd side, where the upper tokens are no half."""
    height, width = grid.shape[-2:]
    if height % 2 or width % 2:
        raise FewlinesError(
            f"tokenizer.two_levels: a grid of {height}×{width} tokens; both sides must be even"
        )
    return grid
