"""The keys of `model` for LlamaGen's transformer."""

from __future__ import annotations

from pydantic import Field, model_validator

from fewlines.models.base import ModelSettings, TokenSpec
from fewlines.models.llamagen.shape import SHAPES, TransformerShape
from fewlines.schema import Positive


class LlamaGenSettings(ModelSettings):
    """LlamaGen's autoregressive transformer (arXiv 2406.06525)."""

    shape: str | None = Field(None, description="of the checkpoint, which then says what is below")
    side: Positive | None = Field(None, description="tokens of a side of the checkpoint's images")
    dim: Positive = Field(192, description="width; a multiple of 4 × heads")
    layers: Positive = Field(6, description="transformer layers")
    heads: Positive = Field(3, description="query heads of a layer")
    kv_heads: Positive | None = Field(None, description="key-value heads; null: as many as heads")

    def make_shape(self, spec: TokenSpec) -> TransformerShape:
        """Make the shape of the transformer that is trained on such tokens."""
        sizes = (self.dim, self.layers, self.heads, self.kv_heads or self.heads)
        return TransformerShape(*sizes, spec.codes, spec.classes, spec.grid)

    @model_validator(mode="after")
    def _checkpoint_has_a_shape(self) -> LlamaGenSettings:
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"unknown shape '{self.shape}'; there are {', '.join(SHAPES)}")
        given = [self.checkpoint, self.shape, self.side]
        if any(given) and not all(given):
            raise ValueError("checkpoint, shape and side go together; write all three or none")
        return self
