"""Gated PixelCNN (arXiv 1606.05328) over codes, read top to bottom.

A vertical stack sees rows above, a horizontal one the row so far, and the first feeds the second:
no blind spot. All layers together see `layers · (kernel // 2) + 1` rows up, each of them a few, so
drawing keeps a few lines of activations, as Fast PixelCNN++ does (arXiv 1704.06001). The first
layer's mask is no wider than the others', where the paper's is 7×7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewlines.models.base import Model, ModelSettings, ModelShape, State, TokenSpec
from fewlines.schema import Odd, Positive


@dataclass(frozen=True)
class PixelCNNShape(ModelShape):
    """A shape.

    Attributes:
        channels: of each stack.
        layers: gated ones.
        kernel: side of the masked square, odd: a layer sees so many columns, and `kernel // 2` rows
            above.
    """

    channels: Positive
    layers: Positive
    kernel: Odd

    @property
    def rows(self) -> int:
        """Rows that a vertical convolution reads."""
        return self.kernel // 2 + 1

    @property
    def columns(self) -> int:
        """Columns that a horizontal convolution reads."""
        return self.kernel // 2 + 1


class PixelCNNSettings(ModelSettings):
    """Gated PixelCNN (arXiv 1606.05328)."""

    family: str = Field("pixelcnn", description="the model family")
    channels: Positive = Field(104, description="of each of the two stacks")
    layers: Positive = Field(12, description="gated layers")
    kernel: Odd = Field(3, description="side of the masked convolutions")

    def make_shape(self, spec: TokenSpec) -> PixelCNNShape:
        """Make the shape of the model that is trained on such tokens."""
        sizes = (self.channels, self.layers, self.kernel)
        return PixelCNNShape(*sizes, **vars(spec))


class GatedLayer(nn.Module):
    """Both stacks of a layer; the vertical one goes before its gate into the horizontal one."""

    def __init__(self, shape: PixelCNNShape) -> None:
        super().__init__()
        width, self.kernel = shape.channels, shape.kernel
        self.vertical = nn.Conv2d(width, 2 * width, (shape.rows, shape.kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, shape.columns))
        self.down = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.condition = nn.Embedding(shape.classes + 1, 4 * width)  # of either stack

    def read_above(self, above: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the vertical stack.

        Args:
            above: `(B, C, rows − 1 + R, w)`, what it reads for `R` rows.
            labels: class numbers `(B,)`.

        Returns:
            What goes into the horizontal stack `(B, 2C, R, w)`, and what into the next layer `(B,
            C, R, w)`.
        """
        side = self.kernel // 2
        read = self.vertical(F.pad(above, (side, side, 0, 0)))
        condition = self.condition(labels)[..., None, None].chunk(2, dim=1)[0]
        return self.down(read), gate(read + condition)

    def read_left(self, left: Tensor, down: Tensor, labels: Tensor) -> Tensor:
        """Run the horizontal stack.

        Args:
            left: `(B, C, R, columns − 1 + T)`, what it reads for `T` columns of `R` rows.
            down: `(B, 2C, R, T)`, of the vertical stack.
            labels: class numbers `(B,)`.

        Returns:
            What goes into the next layer, `(B, C, R, T)`.
        """
        condition = self.condition(labels)[..., None, None].chunk(2, dim=1)[1]
        gated = gate(self.horizontal(left) + down + condition)
        residual = left[..., left.shape[-1] - down.shape[-1] :]
        out: Tensor = residual + self.out(gated)
        return out


def gate(x: Tensor) -> Tensor:
    """The half of the channels through tanh, times the other through a sigmoid."""
    value, opening = x.chunk(2, dim=1)
    return value.tanh() * opening.sigmoid()


class PixelCNN(Model):
    """Class numbers and codes in raster order → logits of the next code."""

    name = "pixelcnn"
    Settings = PixelCNNSettings
    Shape = PixelCNNShape
    shape: PixelCNNShape
    layers: Any  # of a module list the type of a layer is not known

    def __init__(self, shape: PixelCNNShape) -> None:
        super().__init__()
        self.shape = shape
        self.code = nn.Embedding(shape.codes, shape.channels)
        self.layers = nn.ModuleList(GatedLayer(shape) for _ in range(shape.layers))
        self.hidden = nn.Conv2d(shape.channels, shape.channels, 1)
        self.output = nn.Conv2d(shape.channels, shape.codes, 1)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of deviation `1/√inputs`, twice that before a gate, which halves what
        is small; biases, what the class adds and an output of zeros."""
        for name, parameter in self.named_parameters():
            module = name.removesuffix(".weight").rpartition(".")[2]
            if name.endswith("bias") or module in ("condition", "output"):
                nn.init.zeros_(parameter)
            elif module == "code":
                nn.init.normal_(parameter, generator=generator)
            else:
                gain = 2 if module in ("vertical", "horizontal") else 1
                std = gain * parameter[0].numel() ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)

    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(B, V, R, T)` of the horizontal stack `(B, C, R, T)`."""
        logits: Tensor = self.output(self.hidden(x.relu()).relu())
        return logits

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code `(B, N)` from those before it; logits `(B, N, V)`."""
        image = self.code(codes).unflatten(1, self.shape.grid).movedim(-1, 1)  # (B, C, h, w)
        above = F.pad(image, (0, 0, 1, 0))[:, :, :-1]
        left = F.pad(image, (1, 0))[..., :-1]
        for layer in self.layers:
            window = F.pad(above, (0, 0, self.shape.rows - 1, 0))
            down, above = layer.read_above(window, labels)
            window = F.pad(left, (self.shape.columns - 1, 0))
            left = layer.read_left(window, down, labels)
        return self.read_out(left).flatten(2).transpose(1, 2)

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        """Begin a batch, with lines of activations."""
        return LineCache(self, rows)

    def count_read_bytes(self, cache: Any, rows: int, storage: torch.dtype) -> float:
        """Count the bytes that a token reads, the mean over an image: of each layer what is left of
        its column and what the vertical stack says of it, and, once a line, the rows above."""
        shape = self.shape
        of_layer = (shape.rows - 1) + 2 + (shape.columns - 1)
        numbers = shape.channels * (shape.layers * of_layer + 1)
        return float(rows * numbers * self.dtype.itemsize)

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the convolutions but the last, AdamW for everything else."""
        halves = [self.shape.channels] * 2  # what goes through tanh, and what opens
        split = {"vertical": halves, "horizontal": halves, "down": halves}
        return self.group_for_muon(split, but="condition", also=("hidden",))

    def count_training_flops(self) -> float:
        """Count six operations per weight and token of the convolutions."""
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 4)
        return 6.0 * self.spec.n_tokens * weights


class LineCache(State):
    """The lines of activations that convolutions still read, for each row of the batch

        `L · C · (w·(r − 1) + 2·w + c − 1) + C·w`

    numbers, of `L` layers and `C` channels, `w` columns of a line, `r` rows of a vertical and `c`
    columns of a horizontal convolution: the vertical stack's rows above, what it says of the line
    that is drawn, the last columns of the horizontal stack; and the line itself. (That of the line
    could be made again column by column, with a third of the numbers and twice the operations.)
    """

    def __init__(self, model: PixelCNN, rows: int) -> None:
        """Make the buffers.

        Args:
            model: whose activations they hold.
            rows: of the batch.
        """
        self.model, shape = model, model.shape
        width, channels = shape.grid[1], shape.channels

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(rows, *sizes, device=model.device, dtype=model.dtype)

        layers = range(shape.layers)
        self.line = zeros(channels, 1, width)
        self.above = [zeros(channels, shape.rows - 1, width) for _ in layers]
        self.down = [zeros(2 * channels, 1, width) for _ in layers]
        self.left = [zeros(channels, 1, shape.columns - 1) for _ in layers]

    @property
    def bytes(self) -> int:
        """Bytes of the activations that are kept."""
        return sum(x.nbytes for x in (self.line, *self.above, *self.down, *self.left))

    def start(self, labels: Tensor) -> Tensor:
        """Logits `(B, V)` of the first token."""
        self.labels = labels
        self._begin_line()
        return self._predict(torch.zeros_like(self.line[..., :1]), 0)

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        column, width = int(position) % self.line.shape[-1], self.line.shape[-1]
        read = self.model.code(codes)[:, :, None, None]
        self.line[..., column] = read[..., 0]
        if column + 1 < width:
            return self._predict(read, column + 1)
        self._begin_line()
        return self._predict(torch.zeros_like(read), 0)

    def _begin_line(self) -> None:
        """Run the vertical stack for a line, by the line above it."""
        row = self.line
        for number, layer in enumerate(self.model.layers):
            window = torch.cat([self.above[number], row], dim=2)
            self.down[number], row = layer.read_above(window, self.labels)
            self.above[number] = window[:, :, 1:].contiguous()
            self.left[number].zero_()

    def _predict(self, read: Tensor, column: int) -> Tensor:
        """Run the horizontal stack for one column, by the code `(B, C, 1, 1)` left of it."""
        for number, layer in enumerate(self.model.layers):
            window = torch.cat([self.left[number], read], dim=3)
            down = self.down[number][..., column : column + 1]
            read = layer.read_left(window, down, self.labels)
            self.left[number] = window[..., 1:].contiguous()
        return self.model.read_out(read).flatten(1)
