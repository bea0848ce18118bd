"""Gated DeltaNet (arXiv 2412.06464) over codes, read top to bottom: no cache but a bounded state.

A head keeps a matrix. Every token lets it decay, takes out what it held for the token's key and
writes the token's value in its place:

    S ← α · (I − β · k kᵀ) · S + β · k vᵀ,   o = qᵀ S.

Training runs a chunk at a time: within one, what each token writes is the solution of a triangular
system (arXiv 2406.06484). A convolution over the last few tokens makes queries, keys and values.
Unlike the published models: the place of a token and the class are added to every token, values are
as wide as keys, and how much is written has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.models.base import Model, ModelSettings, ModelShape, State, TokenSpec
from fewlines.schema import Positive

CONVOLUTION = 4  # tokens that queries, keys and values are made of, as published
MULTIPLE = 64  # the hidden width of the feed-forward layer is one of it


@dataclass(frozen=True)
class DeltaNetShape(ModelShape):
    """A shape.

    Attributes:
        dim: width.
        layers: of a mixer and a feed-forward layer.
        heads: each with a state of `dim / heads` squared.
        chunk: tokens that training runs at once; no result depends on it.
    """

    dim: Positive
    layers: Positive
    heads: Positive
    chunk: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        super().__post_init__()
        if self.dim % self.heads:
            raise FewlinesError(f"heads {self.heads} must divide dim {self.dim}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer: two thirds of four times `dim`, rounded up."""
        return -(-8 * self.dim // (3 * MULTIPLE)) * MULTIPLE


class DeltaNetSettings(ModelSettings):
    """Gated DeltaNet (arXiv 2412.06464)."""

    family: str = Field("gated-deltanet", description="the model family")
    dim: Positive = Field(192, description="width; a multiple of heads")
    layers: Positive = Field(6, description="layers")
    heads: Positive = Field(3, description="heads of a layer")
    chunk: Positive = Field(28, description="tokens that training runs at once")

    def make_shape(self, spec: TokenSpec) -> DeltaNetShape:
        """Make the shape of the model that is trained on such tokens."""
        sizes = (self.dim, self.layers, self.heads, self.chunk)
        return DeltaNetShape(*sizes, **vars(spec))


def run_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """Run the recurrence over a whole sequence, a chunk at a time.

    With `γ_t` the product of the decays up to token `t` of the chunk, what it writes is `u_t`, of
    `u_t + β_t Σ_{i<t} γ_t/γ_i (k_t·k_i) u_i = β_t (v_t − γ_t k_tᵀS)`; `S` is the state before it.

    Args:
        q: `(B, H, T, D)`.
        k: `(B, H, T, D)`, of length 1.
        v: `(B, H, T, D)`.
        beta: `(B, H, T)`, how much of it is written.
        decay: `(B, H, T)`, logarithms of `α`.
        chunk: tokens at once.

    Returns:
        `(B, H, T, D)`.
    """
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    split = (x.split(chunk, dim=2) for x in (q, k, v, beta[..., None], decay))
    for query, key, value, share, logarithms in zip(*split, strict=True):
        total = logarithms.cumsum(-1)  # (B, H, C)
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        since = total.exp()[..., None]
        system = (share * between * (key @ key.mT)).tril(-1)
        wanted = share * (value - since * (key @ state))
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(since * (query @ state) + (between * (query @ key.mT)) @ written)
        left = (total[..., -1:] - total).exp()[..., None]
        state = since[..., -1:, :] * state + (left * key).mT @ written
    return torch.cat(outputs, dim=2)


class Mixer(nn.Module):
    """The heads of a layer."""

    def __init__(self, shape: DeltaNetShape) -> None:
        super().__init__()
        self.heads, self.chunk = shape.heads, shape.chunk
        self.wqkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.convolution = nn.Parameter(torch.zeros(CONVOLUTION, 3 * shape.dim))
        self.gates = nn.Linear(shape.dim, 2 * shape.heads)  # of writing, of decay
        self.rate = nn.Parameter(torch.zeros(shape.heads))  # logarithm of the decay's
        self.open = nn.Linear(shape.dim, shape.dim, bias=False)
        self.norm = nn.RMSNorm(shape.dim // shape.heads, eps=1e-5)
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)

    def read(self, window: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Make what the recurrence takes: `q`, `k`, `v` `(B, H, T, D)`, `β` and `log α` `(B, H,
        T)`.

        Args:
            window: projected tokens `(B, CONVOLUTION − 1 + T, 3·dim)`.
            x: `(B, T, dim)`.
        """
        mixed = torch.einsum("btcj,jc->btc", window.unfold(1, CONVOLUTION, 1), self.convolution)
        heads = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        write, decay = self.gates(x).mT.chunk(2, dim=1)  # (B, H, T)
        decay = -self.rate.exp()[:, None] * F.softplus(decay)
        scale = q.shape[-1] ** -0.5
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, write.sigmoid(), decay

    def write(self, y: Tensor, x: Tensor) -> Tensor:
        """Close the layer: `(B, H, T, D)` and its input `(B, T, dim)` → `(B, T, dim)`."""
        normed = self.norm(y).transpose(1, 2).flatten(2)
        out: Tensor = self.wo(normed * F.silu(self.open(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Run a whole sequence `(B, T, dim)`."""
        window = F.pad(self.wqkv(x), (0, 0, CONVOLUTION - 1, 0))
        q, k, v, share, decay = (each.to(_exact(each.dtype)) for each in self.read(window, x))
        with torch.autocast(x.device.type, enabled=False):
            mixed = run_chunks(q, k, v, share, decay, self.chunk)
        return self.write(mixed.to(x.dtype), x)

    def step(self, x: Tensor, state: Tensor, last: Tensor) -> Tensor:
        """Run one token `(B, 1, dim)`; `state` `(B, H, D, D)` and `last` `(B, CONVOLUTION − 1,
        3·dim)` are changed in place."""
        window = torch.cat([last, self.wqkv(x)], dim=1)
        last.copy_(window[:, 1:])
        read = self.read(window, x)
        q, k, v, share, decay = (each.to(state.dtype) for each in read)
        state.mul_(decay[..., None].exp())
        state += k.mT @ (share[..., None] * (v - k @ state))
        return self.write((q @ state).to(x.dtype), x)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What a recurrence is kept in: decays near 1 are 1 in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


class Block(nn.Module):
    """A mixer and SwiGLU, each after a norm and beside a residual."""

    def __init__(self, shape: DeltaNetShape) -> None:
        super().__init__()
        self.mixer = Mixer(shape)
        self.mixer_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.w1 = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor, *kept: Tensor) -> Tensor:
        """Run a whole sequence `(B, T, dim)`, or one token with what is kept."""
        normed = self.mixer_norm(x)
        x = x + (self.mixer.step(normed, *kept) if kept else self.mixer(normed))
        normed = self.ffn_norm(x)
        out: Tensor = x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))
        return out


class GatedDeltaNet(Model):
    """Class numbers and codes in raster order → logits of the next code."""

    name = "gated-deltanet"
    Settings = DeltaNetSettings
    Shape = DeltaNetShape
    any_grid = False
    shape: DeltaNetShape
    layers: Any  # of a module list the type of a layer is not known

    def __init__(self, shape: DeltaNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.label = nn.Embedding(shape.classes + 1, shape.dim)
        self.code = nn.Embedding(shape.codes, shape.dim)
        self.place = nn.Parameter(torch.zeros(shape.grid[0] * shape.grid[1], shape.dim))
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.output = nn.Linear(shape.dim, shape.codes, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights of standard deviation 0.02 and an output of zeros; convolutions begin
        with the last token, decays between 1 and 16 times a softplus of 0.001 to 0.1."""
        for name, parameter in self.named_parameters():
            if name == "output.weight" or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("convolution"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
                parameter.data[-1] += 1
            elif name.endswith("rate"):
                nn.init.uniform_(parameter, 1, 16, generator=generator)
                parameter.data.log_()
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
        for layer in self.layers:
            decays = layer.mixer.gates.bias.data[self.shape.heads :]
            decays.copy_(torch.linspace(-6.9, -2.2, self.shape.heads))  # of 0.001 to 0.1

    def embed(self, labels: Tensor, codes: Tensor, first: int = 0) -> Tensor:
        """Embed codes `(B, T)` before the tokens that they predict, from place `first` on, and with
        each the class `(B,)`: `(B, T, dim)`, or `(B, 1 + T, dim)` where none is before the
        first."""
        read = self.code(codes)
        if first == 0:
            read = F.pad(read, (0, 0, 1, 0))
        placed: Tensor = read + self.label(labels)[:, None]
        return placed + self.place[first : first + read.shape[1]]

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code `(B, N)` from those before it; logits `(B, N, V)`."""
        x = self.embed(labels, codes[:, :-1])
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.output(self.norm(x))
        return logits

    def begin(self, rows: int, cache: Any, **how: Any) -> State:
        """Begin a batch, with the state of each head."""
        return MatrixState(self, rows)

    def group_parameters(self) -> list[dict[str, Any]]:
        """Muon for the layers' matrices, AdamW for everything else."""
        return self.group_for_muon({"wqkv": [self.shape.dim] * 3}, but="gates")


class MatrixState(State):
    """The state of each head and the last projected tokens, for each row of the batch

        `L · (H · D² + (c − 1) · 3 · dim)`

    numbers, of `L` layers, `H` heads of `D = dim / H`, and a convolution over `c` tokens: as many
    whatever the image.
    """

    def __init__(self, model: GatedDeltaNet, rows: int) -> None:
        """Make the buffers.

        Args:
            model: whose states they hold.
            rows: of the batch.
        """
        self.model, shape = model, model.shape
        head = shape.dim // shape.heads
        sizes = (shape.heads, head, head), (CONVOLUTION - 1, 3 * shape.dim)
        dtypes = _exact(model.dtype), model.dtype
        self.kept = [
            [
                torch.zeros(rows, *size, device=model.device, dtype=dtype)
                for size, dtype in zip(sizes, dtypes, strict=True)
            ]
            for _ in model.layers
        ]

    @property
    def bytes(self) -> int:
        """Bytes of the states that are kept."""
        return sum(x.nbytes for kept in self.kept for x in kept)

    def start(self, labels: Tensor) -> Tensor:
        """Read the class; logits `(B, V)` of the first token."""
        self.labels = labels
        return self._predict(self.model.embed(labels, labels.new_empty(len(labels), 0)))

    def advance(self, step: int) -> None:
        """Go to image token `step`."""
        self.position = step + 1

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        return self._predict(self.model.embed(self.labels, codes[:, None], int(position)))

    def _predict(self, x: Tensor) -> Tensor:
        for layer, kept in zip(self.model.layers, self.kept, strict=True):
            x = layer(x, *kept)
        logits: Tensor = self.model.output(self.model.norm(x))
        return logits[:, -1]
