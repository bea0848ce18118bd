"""VQ tokenizers (VQGAN, arXiv 2012.09841): images ↔ code indices. What every one offers, and the
one that is trained here: convolutions with residual blocks, a codebook on the unit sphere,
straight-through gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlines.arguments import read_integers, read_tensor
from fewlines.errors import FewlinesError
from fewlines.schema import Count, Positive, check_fields


@dataclass(frozen=True)
class TokenizerShape:
    """Attributes: `channels` of an image, `widths` of the levels (each after the first halves
    the side), residual `blocks` of a level, `codes` of `code_dim` dimensions."""

    channels: Positive
    widths: tuple[Positive, ...]
    blocks: Count
    codes: Positive
    code_dim: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        check_fields(self, "tokenizer")

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return int(2 ** (len(self.widths) - 1))


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x + f(x)`."""
        y: Tensor = x + self.inner(x)
        return y


@dataclass(frozen=True)
class Quantized:
    """Attributes: `codes` `(B, D, h, w)` with straight-through gradient, `indices` `(B, h, w)`,
    `loss` of codebook and commitment, `encoded` `(B·h·w, D)` on the unit sphere."""

    codes: Tensor
    indices: Tensor
    loss: Tensor
    encoded: Tensor


class Quantizer(nn.Module):
    """Nearest code by cosine: encodings and codes are l2-normalised (ViT-VQGAN 2110.04627)."""

    counts: Tensor

    def __init__(self, codes: int, code_dim: int) -> None:
        super().__init__()
        # How often each code was used lately: training revives those that hardly are.
        self.register_buffer("counts", torch.zeros(codes))
        self.embedding = nn.Embedding(codes, code_dim)
        nn.init.normal_(self.embedding.weight)

    @property
    def codebook(self) -> Tensor:
        """`(K, D)` on the unit sphere."""
        return F.normalize(self.embedding.weight, dim=-1)

    def forward(
        self, z: Tensor, commitment: float = 0.25, replace: Tensor | None = None
    ) -> Quantized:
        """Quantise `z` `(B, D, h, w)`; where `replace` `(B, h, w)` is not negative, the decoder is
        given that code in place of the nearest one."""
        encoded = F.normalize(z.permute(0, 2, 3, 1), dim=-1)  # (B, h, w, D)
        codebook = self.codebook
        indices = (encoded @ codebook.T).argmax(-1)  # (B, h, w)
        codes = F.embedding(indices, codebook)
        loss = F.mse_loss(codes, encoded.detach())
        loss = loss + commitment * F.mse_loss(encoded, codes.detach())
        if replace is not None:
            given = F.embedding(torch.where(replace < 0, indices, replace), codebook)
            codes = torch.where((replace < 0)[..., None], codes, given)
        codes = encoded + (codes - encoded).detach()
        return Quantized(codes.permute(0, 3, 1, 2), indices, loss, encoded.flatten(0, 2).detach())


class Tokenizer(nn.Module, ABC):
    """Images `(n, C, H, W)` uint8 ↔ indices `(n, H/s, W/s)` for a stride `s`.

    Attributes:
        name: of its kind, as a file's header says it.
        Shape: a frozen dataclass with `channels`, `codes` and `stride` among its fields.
        batch: images that are encoded or decoded at once where nobody says how many.
    """

    name: ClassVar[str]
    Shape: ClassVar[type[Any]]
    batch: ClassVar[int] = 250
    shape: Any

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

    @abstractmethod
    def find_codes(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` in [−1, 1] → indices `(B, h, w)`."""

    @abstractmethod
    def draw_images(self, indices: Tensor) -> Tensor:
        """Decode indices `(B, h, w)` → images `(B, C, H, W)` in [−1, 1] or a little beyond."""

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int | None = None) -> Tensor:
        """Images `(n, C, H, W)` uint8 → indices `(n, h, w)` int64, `batch` at a time.

        Raises:
            FewlinesError: they are no such images, or of a side that tokens do not divide.
        """
        images = read_tensor(images, "tokenizer: images")
        if images.dtype != torch.uint8:
            raise FewlinesError(
                f"tokenizer: images of {str(images.dtype).removeprefix('torch.')}; write uint8, "
                "0 … 255, such as (images * 255).round().to(torch.uint8) of those in 0 … 1"
            )
        channels, stride = self.shape.channels, self.shape.stride
        given = tuple(images.shape)
        if len(given) != 4 or given[1] != channels or given[2] % stride or given[3] % stride:
            raise FewlinesError(
                f"tokenizer: images of shape {given}; write (n, {channels}, H, W), H and W "
                f"multiples of {stride}"
            )
        parts = (part.to(self.device) for part in images.split(batch or self.batch))
        return torch.cat([self.find_codes(to_signed(part)).to(images.device) for part in parts])

    @torch.no_grad()
    def decode(self, indices: Tensor, batch: int | None = None) -> Tensor:
        """Indices `(n, h, w)` → images `(n, C, H, W)` uint8, `batch` at a time.

        Raises:
            FewlinesError: they are no codes of this tokenizer.
        """
        indices = read_integers(indices, "tokenizer: codes", self.shape.codes - 1)
        if indices.ndim != 3:
            raise FewlinesError(
                f"tokenizer: codes of shape {tuple(indices.shape)}; write (n, h, w), such as "
                "codes.unflatten(1, grid)"
            )
        parts = (part.to(self.device).long() for part in indices.split(batch or self.batch))
        drawn = [to_bytes(self.draw_images(part)).to(indices.device) for part in parts]
        return torch.cat(drawn)


class ConvTokenizer(Tokenizer):
    """The tokenizer that is trained here."""

    name = "tokenizer"
    Shape = TokenizerShape
    shape: TokenizerShape

    def __init__(self, shape: TokenizerShape) -> None:
        super().__init__()
        self.shape = shape
        widths = shape.widths
        down: list[nn.Module] = [nn.Conv2d(shape.channels, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                down.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
            down += [Residual(width) for _ in range(shape.blocks)]
        down += [nn.SiLU(), nn.Conv2d(widths[-1], shape.code_dim, 1)]
        up: list[nn.Module] = [nn.Conv2d(shape.code_dim, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            up += [Residual(widths[level]) for _ in range(shape.blocks)]
            if level:
                up += [nn.SiLU(), nn.ConvTranspose2d(widths[level], widths[level - 1], 4, 2, 1)]
        up += [nn.SiLU(), nn.Conv2d(widths[0], shape.channels, 3, padding=1)]
        self.encoder = nn.Sequential(*down)
        self.quantizer = Quantizer(shape.codes, shape.code_dim)
        self.decoder = nn.Sequential(*up)

    def compress(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` → `(B, D, h, w)`, what is quantised."""
        encoded: Tensor = self.encoder(images)
        return encoded

    def expand(self, codes: Tensor) -> Tensor:
        """Decode codes `(B, D, h, w)` → images `(B, C, H, W)`."""
        images: Tensor = self.decoder(codes)
        return images

    def forward(
        self, images: Tensor, commitment: float = 0.25, replace: Tensor | None = None
    ) -> tuple[Tensor, Quantized]:
        """Reconstructions, and what the loss and the codebook's upkeep need."""
        quantized = self.quantizer(self.compress(images), commitment, replace)
        return self.expand(quantized.codes), quantized

    def find_codes(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` in [−1, 1] → indices `(B, h, w)`."""
        indices: Tensor = self.quantizer(self.compress(images)).indices
        return indices

    def draw_images(self, indices: Tensor) -> Tensor:
        """Decode indices `(B, h, w)` → images `(B, C, H, W)`."""
        return self.expand(F.embedding(indices, self.quantizer.codebook).permute(0, 3, 1, 2))


def to_signed(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [−1, 1] → uint8, clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
