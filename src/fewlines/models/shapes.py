"""Published model shapes, for benchmarks and plans: cost does not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewlines.errors import FewlinesError
from fewlines.models.transformer import Transformer, TransformerShape, rope_2d


@dataclass(frozen=True)
class PublishedShape:
    """Attributes: as in `TransformerShape`; `grid` is that of the published images."""

    dim: int
    layers: int
    heads: int
    codes: int
    grid: tuple[int, int]
    prefix: int = 1
    kv_heads: int | None = None

    def on(self, grid: tuple[int, int]) -> TransformerShape:
        return TransformerShape(
            self.dim,
            self.layers,
            self.heads,
            self.kv_heads or self.heads,
            self.codes,
            1000,
            grid,
            prefix=self.prefix,
        )


SHAPES = {
    # LlamaGen, class-conditional (2406.06525)
    "llamagen-b": PublishedShape(768, 12, 12, 16384, (16, 16)),
    "llamagen-l": PublishedShape(1024, 24, 16, 16384, (16, 16)),
    "llamagen-xl": PublishedShape(1280, 36, 20, 16384, (24, 24)),
    "llamagen-xxl": PublishedShape(1536, 48, 24, 16384, (24, 24)),
    "llamagen-3b": PublishedShape(3200, 24, 32, 16384, (24, 24)),
    # Janus-Pro-1B (2501.17811): DeepSeek-LLM with a text prompt before the image
    "janus-1b": PublishedShape(2048, 24, 16, 16384, (24, 24), prefix=64),
    # Lumina-mGPT (2408.02657): Chameleon 7B, and a long instruction before the image
    "lumina-7b": PublishedShape(4096, 32, 32, 65536, (48, 49), prefix=256),
}


def published_shape(name: str) -> PublishedShape:
    """The published shape of that name; raises `FewlinesError` with the names that exist."""
    if name not in SHAPES:
        raise FewlinesError(f"unknown shape '{name}'; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def random_transformer(
    shape: TransformerShape, precision: torch.dtype, generator: torch.Generator
) -> Transformer:
    """A model of this shape whose weights are one random row, repeated: for measuring cost. The
    matrices lie in `precision`, so that a large one is never held twice."""
    with torch.device("meta"):
        model = Transformer(shape)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(precision)
    model.to_empty(device="cpu")
    model.rotations = rope_2d(shape)
    for parameter in model.parameters():
        row = torch.randn(parameter.shape[-1], generator=generator) * 0.02
        parameter.data.copy_(row)
    return model.eval().requires_grad_(False)
