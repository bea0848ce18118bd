"""Settings of what stands between images and codes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fewlines.models.pixels import PixelShape, PixelTokenizer
from fewlines.models.tokenizer import ConvTokenizer, Tokenizer, TokenizerShape
from fewlines.models.two_level import TwoLevelTokenizer
from fewlines.schema import Levels, Positive, Rate, Section, Share


class TokenizerSettings(Section):
    """The VQ model between images and codes."""

    weights: Path | None = Field(None, description="of a trained one, in place of training")
    levels: Levels | None = Field(
        None, description="grey levels that are tokens, a pixel each, in place of training"
    )
    two_levels: bool = Field(
        False,
        description="every second token of every second line sees twice as far, after VQ-VAE-2",
    )
    widths: tuple[Positive, ...] = Field(
        (24, 48),
        min_length=1,
        description="channels of each level; every level after the first halves the side",
    )
    blocks: int = Field(0, ge=0, description="residual blocks of a level")
    codes: int = Field(256, gt=1, description="entries of the codebook")
    code_dim: Positive = Field(8, description="dimensions of a code, l2-normalised")
    commitment: Rate = Field(0.25, description="weight of the commitment loss")
    perturbation: Share = Field(0.1, description="share of codes replaced at random in training")
    steps: Positive = Field(800, description="of training")
    batch: Positive = Field(128, description="images of a step")
    learning_rate: Rate = Field(2e-3, description="peak, AdamW")

    @model_validator(mode="after")
    def _one_of_three(self) -> TokenizerSettings:
        if sum(map(bool, (self.weights, self.levels, self.two_levels))) > 1:
            raise ValueError("weights, levels and two_levels are three tokenizers; write one")
        return self

    @property
    def trained(self) -> bool:
        """Whether the experiment trains it."""
        return not (self.weights or self.levels)

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return 1 if self.levels else int(2 ** (len(self.widths) - 1))

    def make(self, channels: int) -> Tokenizer:
        """Make a tokenizer for images of so many channels, as it is before training."""
        if self.levels:
            return PixelTokenizer(PixelShape(channels, self.levels))
        sizes = (channels, self.widths, self.blocks, self.codes, self.code_dim)
        return (TwoLevelTokenizer if self.two_levels else ConvTokenizer)(TokenizerShape(*sizes))
