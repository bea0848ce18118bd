"""The numbers of a model and an image that a cache has to know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """An image of `h × w` tokens in raster order, after a prefix, in a model's layers and heads.

    Attributes:
        grid: `(h, w)`; a line is one row of `w` tokens.
        prefix: condition tokens before the image (class: 1); pinned, never evicted.
        layers: transformer layers.
        heads: key-value heads of a layer.
    """

    grid: tuple[int, int]
    prefix: int
    layers: int
    heads: int

    @property
    def n_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """Tokens of a line."""
        return self.grid[1]

    def band(self, tokens: Table, slots: int) -> Table:
        """Find which of a head's merge slots each token is merged into: columns side by side share
        one."""
        return tokens % self.width * slots // self.width
