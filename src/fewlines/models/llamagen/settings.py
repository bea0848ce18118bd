"""The keys of `model` for LlamaGen's transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from fewlines.models.base import ModelSettings, TokenSpec
from fewlines.models.llamagen.shape import SHAPES, TransformerShape
from fewlines.schema import Positive


class LlamaGenSettings(ModelSettings):
    """LlamaGen's autoregressive transformer (arXiv 2406.06525)."""

    shape: str | None = Field(
        None, description="published shape that the checkpoint must have; null finds it"
    )
    side: Positive | None = Field(
        None,
        description="tokens of a side of the checkpoint's images; null: what it or its shape says",
    )
    part: Literal["model", "ema"] | None = Field(
        None, description="which weights of a checkpoint that holds both; null: model, and says so"
    )
    dim: Positive = Field(192, description="width; a multiple of 4 × heads")
    layers: Positive = Field(6, description="transformer layers")
    heads: Positive = Field(3, description="query heads of a layer")
    kv_heads: Positive | None = Field(None, description="key-value heads; null: as many as heads")

    def make_shape(self, spec: TokenSpec) -> TransformerShape:
        """Make the shape of the transformer that is trained on such tokens."""
        sizes = (self.dim, self.layers, self.heads, self.kv_heads or self.heads)
        shape = TransformerShape(*sizes, spec.codes, spec.classes, spec.grid)
        return replace(shape, has_null_class=self.class_dropout > 0)

    @model_validator(mode="after")
    def _checkpoint_has_a_shape(self) -> LlamaGenSettings:
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"unknown shape '{self.shape}'; there are {', '.join(SHAPES)}")
        if self.checkpoint is None and any((self.shape, self.side, self.part)):
            raise ValueError("shape, side and part are of a checkpoint; write that, too, or none")
        return self

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """What the checkpoint's reader is told: heads, where they were written."""
        given = {"shape": self.shape, "side": self.side, "part": self.part}
        given |= {"heads": self.heads} if "heads" in self.model_fields_set else {}
        return {name: value for name, value in given.items() if value is not None}
