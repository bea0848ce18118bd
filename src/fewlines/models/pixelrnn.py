"""PixelRNN (arXiv 1601.06759) over codes, read top to bottom: Row LSTM and Diagonal BiLSTM.

Its memory is a line: the states of the line above, from which those of the next are made. A first
masked convolution reads the row above and the codes to the left, no further, where the paper's is
7×7; the layers follow, each with a residual. Forget gates begin open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewlines.models.base import Model, ModelSettings, ModelShape, State, TokenSpec
from fewlines.schema import Odd, Positive

Variant = Literal["row", "diagonal"]


@dataclass(frozen=True)
class PixelRNNShape(ModelShape):
    """A shape.

    Attributes:
        variant: Row LSTM or Diagonal BiLSTM.
        hidden: units of an LSTM; what goes from layer to layer is twice as wide.
        layers: of LSTMs.
        kernel: columns that a state of a Row LSTM is made of, odd.
    """

    variant: Variant
    hidden: Positive
    layers: Positive
    kernel: Odd


class PixelRNNSettings(ModelSettings):
    """PixelRNN (arXiv 1601.06759)."""

    family: str = Field("pixelrnn", description="the model family")
    variant: Variant = Field("row", description="Row LSTM or Diagonal BiLSTM")
    hidden: Positive = Field(96, description="units of an LSTM")
    layers: Positive = Field(7, description="layers of LSTMs")
    kernel: Odd = Field(3, description="columns of the line above that a token reads")

    def make_shape(self, spec: TokenSpec) -> PixelRNNShape:
        """Make the shape of the model that is trained on such tokens."""
        sizes = (self.variant, self.hidden, self.layers, self.kernel)
        return PixelRNNShape(*sizes, **vars(spec))


def update(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Update an LSTM: gates `(B, T, 4H)` and cell `(B, T, H)` → hidden state and cell."""
    out, forget, write, value = gates.chunk(4, dim=-1)
    cell = forget.sigmoid() * cell + write.sigmoid() * value.tanh()
    return out.sigmoid() * cell.tanh(), cell


class RowLSTM(nn.Module):
    """A row at a time: its states are made of those of the row above, `kernel` columns wide, and of
    the inputs up to their own column."""

    def __init__(self, shape: PixelRNNShape) -> None:
        super().__init__()
        hidden, self.kernel = shape.hidden, shape.kernel
        self.columns = shape.kernel // 2 + 1  # of the masked input convolution
        self.input = nn.Linear(self.columns * 2 * hidden, 4 * hidden)
        self.state = nn.Linear(self.kernel * hidden, 4 * hidden, bias=False)
        self.out = nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Run a whole image `(B, h, w, 2H)`."""
        given = self.input(join_columns(F.pad(x, (0, 0, self.columns - 1, 0)), self.columns))
        state = x.new_zeros(len(x), x.shape[2], self.state.in_features // self.kernel)
        cell, rows, side = state, [], self.kernel // 2
        for row in given.unbind(1):
            around = join_columns(F.pad(state, (0, 0, side, side)), self.kernel)
            state, cell = update(row + self.state(around), cell)
            rows.append(state)
        out: Tensor = x + self.out(torch.stack(rows, dim=1))
        return out

    def begin(self, rows: int, width: int, like: Tensor) -> list[Tensor]:
        """The buffers of an image that is drawn: the line of states and of cells, the states of the
        line above that are still read left of the token, the last inputs."""
        hidden = self.state.in_features // self.kernel
        sizes = (width, hidden), (width, hidden), (self.kernel // 2, hidden)
        shapes = (*sizes, (self.columns - 1, 2 * hidden))
        return [like.new_zeros(rows, *shape) for shape in shapes]

    def step(self, kept: list[Tensor], x: Tensor, column: int) -> Tensor:
        """Run one token `(B, 2H)` of the line; `kept` is changed in place."""
        states, cells, above, inputs = kept
        if column == 0:
            above.zero_()
            inputs.zero_()
        window = torch.cat([inputs, x[:, None]], dim=1)
        right = states[:, column : column + self.kernel // 2 + 1]
        right = F.pad(right, (0, 0, 0, self.kernel // 2 + 1 - right.shape[1]))
        around = torch.cat([above, right], dim=1)
        gates = self.input(window.flatten(1)) + self.state(around.flatten(1))
        above.copy_(around[:, 1 : self.kernel // 2 + 1])
        inputs.copy_(window[:, 1:])
        states[:, column], cells[:, column] = update(gates, cells[:, column])
        out: Tensor = x + self.out(states[:, column])
        return out

    def end_line(self, kept: list[Tensor]) -> None:
        """Nothing is left to do at the end of a line."""


class Direction(nn.Module):
    """An LSTM along the diagonals: a state is made of that to its left and of that above."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(2 * hidden, 4 * hidden)
        self.beside = nn.Linear(hidden, 4 * hidden, bias=False)
        self.above = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run `(B, h, w, 2H)` → states `(B, h, w, H)`: on a map whose row `r` is moved `r` columns
        to the right, all that a column of it needs lies in the column before."""
        B, height, width, _ = x.shape
        given, steps = self.input(x), width + height - 1
        state = cell = x.new_zeros(B, height, self.beside.in_features)
        rows = torch.arange(height, device=x.device)
        columns = []
        for step in range(steps):
            inside = (rows <= step) & (step - rows < width)
            gates = given[:, rows, (step - rows).clamp(0, width - 1)]
            gates = gates + self.beside(state) + self.above(F.pad(state, (0, 0, 1, 0))[:, :-1])
            state, cell = (made * inside[:, None] for made in update(gates, cell))
            columns.append(state)
        skewed = torch.stack(columns, dim=2)  # (B, h, w + h − 1, H)
        return skewed[:, rows[:, None], rows[:, None] + torch.arange(width, device=x.device)]

    def step(self, states: Tensor, cell: Tensor, x: Tensor, column: int) -> Tensor:
        """Run one token `(B, 2H)`; `states` `(B, w, H)` of the line above becomes this line's up to
        here, `cell` `(B, H)` this token's."""
        gates = self.input(x) + self.above(states[:, column])
        if column:
            gates = gates + self.beside(states[:, column - 1])
        states[:, column], made = update(gates, cell if column else torch.zeros_like(cell))
        cell.copy_(made)
        return states[:, column]


class DiagonalBiLSTM(nn.Module):
    """Two directions; the one from the right is of the row above, lest it see what is to come."""

    def __init__(self, shape: PixelRNNShape) -> None:
        super().__init__()
        self.left, self.right = Direction(shape.hidden), Direction(shape.hidden)
        self.out = nn.Linear(shape.hidden, 2 * shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Run a whole image `(B, h, w, 2H)`."""
        right = self.right(x.flip(2)).flip(2)
        both = self.left(x) + F.pad(right, (0, 0, 0, 0, 1, 0))[:, :-1]
        out: Tensor = x + self.out(both)
        return out

    def begin(self, rows: int, width: int, like: Tensor) -> list[Tensor]:
        """The buffers of an image that is drawn: each direction's line of states and its cell, and
        the inputs of the line, for the direction that begins at its end."""
        hidden = self.out.in_features
        shapes = (width, hidden), (hidden,), (width, hidden), (hidden,), (width, 2 * hidden)
        return [like.new_zeros(rows, *shape) for shape in shapes]

    def step(self, kept: list[Tensor], x: Tensor, column: int) -> Tensor:
        """Run one token `(B, 2H)` of the line; `kept` is changed in place."""
        left, cell, right, _, inputs = kept
        inputs[:, column] = x
        both = self.left.step(left, cell, x, column) + right[:, inputs.shape[1] - 1 - column]
        out: Tensor = x + self.out(both)
        return out

    def end_line(self, kept: list[Tensor]) -> None:
        """Run the direction from the right, for the line below."""
        _, _, right, cell, inputs = kept
        for column, x in enumerate(inputs.flip(1).unbind(1)):
            self.right.step(right, cell, x, column)


def join_columns(x: Tensor, count: int) -> Tensor:
    """Join `count` neighbours: `(…, count − 1 + w, C)` → `(…, w, count · C)`, left to right."""
    return x.unfold(-2, count, 1).transpose(-1, -2).flatten(-2)


class PixelRNN(Model):
    """Class numbers and codes in raster order → logits of the next code."""

    name = "pixelrnn"
    Settings = PixelRNNSettings
    Shape = PixelRNNShape
    shape: PixelRNNShape
    layers: Any  # of a module list the type of a layer is not known

    def __init__(self, shape: PixelRNNShape) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * shape.hidden
        kind = RowLSTM if shape.variant == "row" else DiagonalBiLSTM
        self.label = nn.Embedding(shape.classes + 1, width)
        self.code = nn.Embedding(shape.codes, width)
        self.first = nn.Linear((shape.kernel + shape.kernel // 2) * width, width)
        self.layers = nn.ModuleList(kind(shape) for _ in range(shape.layers))
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, shape.codes)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of deviation `1/√inputs`, biases and an output of zeros, but for
        forget gates: of 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "output.weight":
                nn.init.zeros_(parameter)
            else:
                inputs = 1 if name in ("label.weight", "code.weight") else parameter.shape[1]
                nn.init.normal_(parameter, std=inputs**-0.5, generator=generator)
            if name.endswith("input.bias"):
                parameter.data.unflatten(0, (4, -1))[1] += 1

    def read_codes(self, above: Tensor, left: Tensor, label: Tensor) -> Tensor:
        """Run the masked convolution: `kernel` embedded codes above, `kernel // 2` to the left,
        side by side in the last dimension."""
        read: Tensor = self.first(torch.cat([above, left], dim=-1))
        return read + label

    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(…, V)` of what has been through all layers `(…, 2H)`."""
        logits: Tensor = self.output(self.hidden(x.relu()).relu())
        return logits

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code `(B, N)` from those before it; logits `(B, N, V)`."""
        side, kernel = self.shape.kernel // 2, self.shape.kernel
        image = self.code(codes).unflatten(1, self.shape.grid)  # (B, h, w, 2H)
        above = F.pad(image, (0, 0, side, side, 1, 0))[:, :-1]
        left = F.pad(image, (0, 0, side, 0))[:, :, :-1]
        left = join_columns(left, side) if side else image[..., :0]
        x = self.read_codes(join_columns(above, kernel), left, self.label(labels)[:, None, None])
        for layer in self.layers:
            x = layer(x)
        return self.read_out(x).flatten(1, 2)

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        """Begin a batch, with a line of states."""
        return LineState(self, rows)

    def count_read_bytes(self, cache: Any, rows: int, storage: torch.dtype) -> float:
        """Count the bytes that a token reads: of each layer the states, cells and inputs that its
        own are made of, in both directions; and the embedded codes of the first convolution."""
        shape, side = self.shape, self.shape.kernel // 2
        row, diagonal = shape.kernel + 1 + 2 * side, 2 * (1 + 1 + 1) + 1 + 2
        of_layer = shape.hidden * (row if shape.variant == "row" else diagonal)
        numbers = shape.layers * of_layer + 2 * shape.hidden * (shape.kernel + side)
        return float(rows * numbers * self.dtype.itemsize)

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the matrices but the last, gate by gate, AdamW for everything else."""
        gates = [self.shape.hidden] * 4
        split = dict.fromkeys(("input", "state", "beside", "above"), gates)
        return self.group_for_muon(split, also=("first", "hidden"))

    def count_training_flops(self) -> float:
        """Count six operations per weight and token of the products."""
        weights = sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2 and name not in ("label.weight", "code.weight")
        )
        return 6.0 * self.spec.n_tokens * weights


class LineState(State):
    """The states of a line, for each row of the batch, with `H` units, `w` columns of a line and a
    kernel `k`, in each layer

        Row LSTM: `2·w·H + ⌊k/2⌋·H + ⌊k/2⌋·2·H`; Diagonal BiLSTM: `2·(w·H + H) + w·2·H`

    numbers; and once the embedded line above, `(w + ⌊k/2⌋)·2·H`, and `⌊k/2⌋·2·H` of the line that
    is drawn.
    """

    def __init__(self, model: PixelRNN, rows: int) -> None:
        """Make the buffers.

        Args:
            model: whose states they hold.
            rows: of the batch.
        """
        self.model, shape = model, model.shape
        self.width, side = shape.grid[1], shape.kernel // 2
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        # What was above stands `side` columns to the left of where it is still read: the codes of
        # the line take the place of those above when they are read no more.
        self.line = like.new_zeros(rows, self.width + side, 2 * shape.hidden)
        self.left = like.new_zeros(rows, side, 2 * shape.hidden)
        self.kept = [layer.begin(rows, self.width, like) for layer in model.layers]

    @property
    def bytes(self) -> int:
        """Bytes of the states that are kept."""
        inside = (x.nbytes for kept in self.kept for x in kept)
        return self.line.nbytes + self.left.nbytes + int(sum(inside))

    def start(self, labels: Tensor) -> Tensor:
        """Logits `(B, V)` of the first token."""
        self.labels = labels
        return self._predict(0)

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        column, side = int(position) % self.width, self.left.shape[1]
        code = self.model.code(codes)
        self.line[:, column] = code  # `side` to the left: read there no more in this line
        if column + 1 < self.width:
            self.left.copy_(torch.cat([self.left, code[:, None]], dim=1)[:, 1:])
            return self._predict(column + 1)
        for layer, kept in zip(self.model.layers, self.kept, strict=True):
            layer.end_line(kept)
        self.line.copy_(F.pad(self.line[:, : self.width], (0, 0, side, 0)))
        self.left.zero_()
        return self._predict(0)

    def _predict(self, column: int) -> Tensor:
        side = self.left.shape[1]
        above = self.line[:, column : column + 2 * side + 1]
        above = F.pad(above, (0, 0, 0, 2 * side + 1 - above.shape[1]))
        x = self.model.read_codes(
            above.flatten(1), self.left.flatten(1), self.model.label(self.labels)
        )
        for layer, kept in zip(self.model.layers, self.kept, strict=True):
            x = layer.step(kept, x, column)
        return self.model.read_out(x)
