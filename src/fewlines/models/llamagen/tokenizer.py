"""LlamaGen's published VQ tokenizers (arXiv 2406.06525, after VQGAN 2012.09841): VQ-16 and VQ-8, by
their own names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.models.llamagen.checkpoint import fill, read_weights
from fewlines.models.tokenizer import Tokenizer
from fewlines.schema import Positive, check_fields

GROUPS = 32  # of every normalisation


@dataclass(frozen=True)
class LlamaGenTokenizerShape:
    """Attributes: `channels` of an image, `width` of the first level and its `multipliers` level by
    level (each after the first halves the side), residual `blocks` of a level, `latent` channels
    before the codes, `codes` of `code_dim` dimensions."""

    channels: Positive
    width: Positive
    multipliers: tuple[Positive, ...]
    blocks: Positive
    latent: Positive
    codes: Positive
    code_dim: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        check_fields(self, "tokenizer")
        if self.width % GROUPS:
            raise FewlinesError(f"tokenizer: width {self.width} is no multiple of {GROUPS}")

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.width * multiplier for multiplier in self.multipliers]


# By their stride: VQ-16 and VQ-8.
SHAPES = {
    16: LlamaGenTokenizerShape(3, 128, (1, 1, 2, 2, 4), 2, 256, 16384, 8),
    8: LlamaGenTokenizerShape(3, 128, (1, 2, 2, 4), 2, 256, 16384, 8),
}


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions beside the input, which a third brings to their width."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(into), nn.Conv2d(into, width, 3, padding=1)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, padding=1)
        if into != width:
            self.nin_shortcut = nn.Conv2d(into, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `s(x) + f(x)`."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        sum_: Tensor = (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y
        return sum_


class AttnBlock(nn.Module):
    """One head of attention over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x + f(x)`."""
        given = self.norm(x)
        q, k, v = (f(given).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        y: Tensor = x + self.proj_out(seen)
        return y


class Downsample(nn.Module):
    """Half the side; zeros are added below and on the right alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(B, C, H, W)` → `(B, C, H/2, W/2)`."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Twice the side: every place four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(B, C, H, W)` → `(B, C, 2H, 2W)`."""
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class Level(nn.Module):
    """Residual blocks of a level, attention after each where the grid is smallest, and the way to
    the next level."""

    def __init__(
        self, into: int, width: int, blocks: int, attends: bool, change: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        widths = pairwise([into, *[width] * blocks])
        self.res = nn.ModuleList(ResnetBlock(*pair) for pair in widths)
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks * attends))
        for name, module in change.items():
            self.add_module(name, module)
        self.change = list(change)

    def forward(self, x: Tensor) -> Tensor:
        """Run the level."""
        for number, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for name in self.change:
            x = self.get_submodule(name)(x)
        return x


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)])


class Encoder(nn.Module):
    """Images → latents, from the large grid to the small."""

    def __init__(self, shape: LlamaGenTokenizerShape) -> None:
        super().__init__()
        widths, last = shape.widths, len(shape.widths) - 1
        self.conv_in = nn.Conv2d(shape.channels, shape.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(into, width, shape.blocks, level == last,
                  {} if level == last else {"downsample": Downsample(width)})
            for level, (into, width) in enumerate(pairwise([shape.width, *widths]))
        )  # fmt: skip
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(B, C, H, W)` → `(B, latent, h, w)`."""
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y


class ImageDecoder(nn.Module):
    """Latents → images, from the small grid to the large, with a block more in every level."""

    def __init__(self, shape: LlamaGenTokenizerShape) -> None:
        super().__init__()
        widths = shape.widths[::-1]
        self.conv_in = nn.Conv2d(shape.latent, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        last = len(widths) - 1
        self.conv_blocks = nn.ModuleList(
            Level(into, width, shape.blocks + 1, level == 0,
                  {} if level == last else {"upsample": Upsample(width)})
            for level, (into, width) in enumerate(pairwise([widths[0], *widths]))
        )  # fmt: skip
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], shape.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(B, latent, h, w)` → `(B, C, H, W)`."""
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y


class Codebook(nn.Module):
    """Codes on the unit sphere."""

    def __init__(self, codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, code_dim)

    @property
    def directions(self) -> Tensor:
        """`(K, D)` of length 1."""
        return F.normalize(self.embedding.weight, dim=-1)


class LlamaGenTokenizer(Tokenizer):
    """VQ-16 and VQ-8: 16 or 8 pixels a token, 16 384 codes of 8 dimensions."""

    name = "llamagen-tokenizer"
    Shape = LlamaGenTokenizerShape
    batch = 4  # of 256 pixels a side: activations of the first level are 32 MB each
    shape: LlamaGenTokenizerShape

    def __init__(self, shape: LlamaGenTokenizerShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = Encoder(shape), ImageDecoder(shape)
        self.quantize = Codebook(shape.codes, shape.code_dim)
        self.quant_conv = nn.Conv2d(shape.latent, shape.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_dim, shape.latent, 1)

    def find_codes(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` in [−1, 1] → indices `(B, h, w)`, the nearest by cosine."""
        encoded = F.normalize(self.quant_conv(self.encoder(images)), dim=1)
        return (encoded.permute(0, 2, 3, 1) @ self.quantize.directions.T).argmax(-1)

    def draw_images(self, indices: Tensor) -> Tensor:
        """Decode indices `(B, h, w)` → images `(B, C, H, W)`."""
        codes = F.embedding(indices, self.quantize.directions).permute(0, 3, 1, 2)
        images: Tensor = self.decoder(self.post_quant_conv(codes))
        return images

    @classmethod
    def read_shape(cls, path: Path) -> LlamaGenTokenizerShape:
        """Read the shape of published weights alone; see `read_checkpoint`."""
        return _read_shape(path, read_weights(path)[0])

    @classmethod
    def read_checkpoint(cls, path: Path, part: str | None = None) -> LlamaGenTokenizer:
        """Read published weights; they say their shape.

        Args:
            path: a `.pt` or `.safetensors` file.
            part: `model` or `ema`, where it holds both.

        Raises:
            FewlinesError: the file is not what it should be.
        """
        found, _ = read_weights(path, part)
        found.pop("quantize.codebook_used", None)  # which were used lately: of training alone
        shape = _read_shape(path, found)
        with torch.device("meta"):
            network = cls(shape)
        return fill(network, found, path)


def _read_shape(path: Path, found: Mapping[str, Tensor]) -> LlamaGenTokenizerShape:
    """The shape of the network that has such tensors."""

    def size(name: str, axis: int) -> int:
        if name not in found or found[name].ndim <= axis:
            raise FewlinesError(f"{path} lacks {name}: no tokenizer of LlamaGen's")
        return int(found[name].shape[axis])

    def count(pattern: str) -> int:
        numbers: set[Any] = {m[1] for m in (re.match(pattern, name) for name in found) if m}
        return len(numbers)

    width = size("encoder.conv_in.weight", 0)
    levels = range(count(r"encoder\.conv_blocks\.(\d+)\."))
    widths = [size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) for level in levels]
    return LlamaGenTokenizerShape(
        channels=size("encoder.conv_in.weight", 1),
        width=width,
        multipliers=tuple(each // max(width, 1) for each in widths),
        blocks=count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent=size("encoder.conv_out.weight", 0),
        codes=size("quantize.embedding.weight", 0),
        code_dim=size("quantize.embedding.weight", 1),
    )
