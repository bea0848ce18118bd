"""Where each head of a model looks, on average: measured once, on training images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.geometry import Geometry

Attention = npt.NDArray[np.float32]
Offset = npt.NDArray[np.int64]

LOSS_OF = "loss_of_"  # so many bands: names in a file


def measure_offsets(grid: tuple[int, int]) -> tuple[Offset, Offset]:
    """Measure how many lines a token lies above each query, and columns to its left, `(N, N)`."""
    line, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return line[:, None] - line, column[:, None] - column


@dataclass(frozen=True, eq=False)
class LossCurves:
    """What the model loses when one head alone is limited, its victims merged.

    Attributes:
        capacities: `(R,)`, rising: tokens that the head may hold; the last is a whole image.
        loss: `(L, H, R)`, KL(full ‖ limited) in nats/token.
        of_bands: the same by the number of merge slots, where a head has several.
    """

    capacities: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    of_bands: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where each head of a model looks, on average: measured once, on training images.

    Attributes:
        attention: `(L, H, N, N)`, the mean probability that the query of one image token gives to
            another, over images and over the query heads of a key-value head.
        grid: `(h, w)` of the images that it was measured on.
        images: how many they were.
        curves: what each head loses, if that was measured.
    """

    attention: Attention
    grid: tuple[int, int]
    images: int
    curves: LossCurves | None = None

    def require_curves(self) -> LossCurves:
        """Give what each head loses.

        Raises:
            FewlinesError: it was not measured.
        """
        if self.curves is None:
            raise FewlinesError(
                "cache: this calibration does not say what each head loses; 'fewlines calibrate' "
                "writes one that does"
            )
        return self.curves

    @cached_property
    def future(self) -> npt.NDArray[np.float64]:
        """`(L, H, N, N)`: how much all queries from each one on will look at each token."""
        backwards = self.attention[:, :, ::-1].cumsum(2, dtype=np.float64)
        return backwards[:, :, ::-1]

    @cached_property
    def by_offset(self) -> Calibration:
        """The same with every query and token that are as far apart, in lines and columns, given
        their mean: what is left when the place of the query is forgotten."""
        return self._spread(self.grid, *measure_offsets(self.grid))

    def transfer(self, grid: tuple[int, int], stretched: bool = False) -> Calibration:
        """Transfer to the model on another grid, by offsets alone.

        Args:
            grid: `(h, w)` of the other images.
            stretched: tokens correspond that are as far apart in the picture, in place of those
                that are as many lines and columns apart; nothing where this grid does not reach.
        """
        up, left = measure_offsets(grid)
        if stretched:
            (height, width), (tall, wide) = self.grid, grid
            up = np.minimum(-(-up * height // tall), height - 1)
            left = np.sign(left) * np.minimum(-(-abs(left) * width // wide), width - 1)
        return self._spread(grid, up, left)

    def _spread(self, grid: tuple[int, int], up: Offset, left: Offset) -> Calibration:
        """Give each query and token of a grid the mean at `up`, `left` `(N, N)` of this one."""
        height, width = self.grid
        here = np.tri(height * width, dtype=bool)
        here[-1] = False  # the last token never asks
        lines, columns = measure_offsets(self.grid)
        cell = np.where(here, lines * (2 * width - 1) + columns + width - 1, 0)
        count = np.bincount(cell.ravel(), minlength=height * (2 * width - 1))
        means = [
            np.bincount(cell.ravel(), head.ravel(), len(count)) / count.clip(1)
            for head in np.tril(self.attention).reshape(-1, *cell.shape)
        ]
        reached = (up >= 0) & (up < height) & (abs(left) < width) & np.tri(len(up), dtype=bool)
        reached[-1] = False
        wanted = np.where(reached, up * (2 * width - 1) + left + width - 1, 0)
        spread = np.where(reached, np.stack(means)[:, wanted], 0)
        attention = spread.reshape(*self.attention.shape[:2], *up.shape).astype(np.float32)
        return Calibration(attention, grid, self.images)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        header = {"grid": self.grid, "images": self.images}
        tensors = {"attention": torch.from_numpy(self.attention).half()}
        if self.curves is not None:
            tensors["capacities"] = torch.from_numpy(self.curves.capacities)
            tensors["loss"] = torch.from_numpy(self.curves.loss)
            for count, loss in self.curves.of_bands.items():
                tensors[f"{LOSS_OF}{count}"] = torch.from_numpy(loss)
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read the file that `save` wrote.

        Raises:
            FewlinesError: there is none, or it is no calibration.
        """
        tensors, header = read_tensors(path)
        if "attention" not in tensors:
            raise FewlinesError(f"{path} is not a calibration; 'fewlines calibrate' writes one")
        try:
            height, width = header["grid"]
            images = int(header["images"])
        except (KeyError, TypeError, ValueError):
            raise FewlinesError(f"{path} does not say what it was measured on") from None
        curves = None
        if {"capacities", "loss"} <= set(tensors):
            more = {
                int(name.removeprefix(LOSS_OF)): tensor.numpy()
                for name, tensor in tensors.items()
                if name.startswith(LOSS_OF)
            }
            of_bands = dict(sorted(more.items()))
            curves = LossCurves(tensors["capacities"].numpy(), tensors["loss"].numpy(), of_bands)
        attention = tensors["attention"].float().numpy()
        if attention.ndim != 4 or attention.shape[2:] != (height * width,) * 2:
            raise FewlinesError(f"{path}: attention {attention.shape} is not of {height}×{width}")
        return cls(attention, (height, width), images, curves)

    def check(self, geometry: Geometry) -> None:
        """Check that it was measured on this model and grid.

        Raises:
            FewlinesError: it was not.
        """
        n = geometry.n_tokens
        wanted = (geometry.layers, geometry.heads, n, n)
        if self.attention.shape != wanted or self.grid != geometry.grid:
            raise FewlinesError(
                f"calibration: measured for {self.attention.shape[0]} layers of "
                f"{self.attention.shape[1]} heads on a {self.grid[0]}×{self.grid[1]} grid, but the "
                f"model has {geometry.layers} of {geometry.heads} on "
                f"{geometry.grid[0]}×{geometry.grid[1]}; run 'fewlines calibrate' for it"
            )


def average(parts: Sequence[Calibration]) -> Calibration:
    """Average calibrations on images of different prompts, by how many they were."""
    images = sum(part.images for part in parts)
    shares = [part.images / images for part in parts]

    def mean(tables: Iterable[Any]) -> Any:
        return sum(share * table for share, table in zip(shares, tables, strict=True))

    attention = mean(part.attention for part in parts).astype(np.float32)
    curves = [part.curves for part in parts if part.curves is not None]
    if not curves:
        return replace(parts[0], attention=attention, images=images)
    bands = {count: mean(one.of_bands[count] for one in curves) for count in curves[0].of_bands}
    loss = replace(curves[0], loss=mean(one.loss for one in curves), of_bands=bands)
    return replace(parts[0], attention=attention, images=images, curves=loss)
