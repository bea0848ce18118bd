"""The shapes of LlamaGen's transformer (arXiv 2406.06525), and those that were published with it or
are served by the same architecture: cost does not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry
from fewlines.schema import Count, Positive, Rate, check_fields


@dataclass(frozen=True)
class TransformerShape:
    """A shape, by LlamaGen's own names where it has them.

    Attributes:
        grid: `(h, w)`, tokens of an image.
        classes: without the null class that stands for 'no condition'.
        prefix: tokens of the condition.
        registers: learned tokens after them, which every cache keeps (arXiv 2309.16588,
            2309.17453).
        caption_dim: numbers of a feature of a caption, of which there are `prefix` at most; 0 where
            images are of classes.
        has_null_class: whether it learned to draw without a class, which guidance needs.
    """

    dim: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    codes: Positive
    classes: Positive
    grid: tuple[Positive, Positive]
    multiple_of: Positive = 256
    norm_eps: Rate = 1e-5
    rope_base: Rate = 10000.0
    prefix: Positive = 1
    registers: Count = 0
    has_null_class: bool = True
    caption_dim: Count = 0

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        check_fields(self, "model")
        if self.dim % (4 * self.heads):
            raise FewlinesError(f"dim {self.dim} / heads {self.heads} must be a multiple of 4")
        if self.heads % self.kv_heads:
            raise FewlinesError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")

    def on(self, grid: tuple[int, int]) -> TransformerShape:
        """Make the shape on another grid `(h, w)`."""
        return replace(self, grid=grid)

    @property
    def head_dim(self) -> int:
        """Numbers of a query, key or value."""
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer: the next multiple of `int(2·4·dim/3)`."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of

    @property
    def geometry(self) -> Geometry:
        """What a cache has to know of it."""
        prefix = self.prefix + self.registers
        return Geometry(self.grid, prefix, layers=self.layers, heads=self.kv_heads)


def _publish(
    dim: int, layers: int, heads: int, codes: int, grid: tuple[int, int], prefix: int = 1
) -> TransformerShape:
    """A shape as published, on the grid of the published images and with ImageNet's classes."""
    return TransformerShape(dim, layers, heads, heads, codes, 1000, grid, prefix=prefix)


SHAPES = {
    # LlamaGen, class-conditional (2406.06525)
    "llamagen-b": _publish(768, 12, 12, 16384, (16, 16)),
    "llamagen-l": _publish(1024, 24, 16, 16384, (16, 16)),
    "llamagen-xl": _publish(1280, 36, 20, 16384, (24, 24)),
    "llamagen-xxl": _publish(1536, 48, 24, 16384, (24, 24)),
    "llamagen-3b": _publish(3200, 24, 32, 16384, (24, 24)),
    "llamagen-xxxl": _publish(2560, 48, 40, 16384, (24, 24)),
    "llamagen-1b": _publish(2048, 22, 32, 16384, (24, 24)),
    "llamagen-7b": _publish(4096, 32, 32, 16384, (24, 24)),
    # Janus-Pro-1B (2501.17811): DeepSeek-LLM with a text prompt before the image
    "janus-1b": _publish(2048, 24, 16, 16384, (24, 24), prefix=64),
    # Lumina-mGPT (2408.02657): Chameleon 7B, and a long instruction before the image
    "lumina-7b": _publish(4096, 32, 32, 65536, (48, 49), prefix=256),
}
