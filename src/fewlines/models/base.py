"""What a family of models offers, and asks of nobody else.

A family is a folder of `fewlines/models` (or a class that another package names by an entry point
`fewlines.models`) with one `Model`. Stages, rules and reports ask it by capability: `has_kv_cache`
says whether cache policies, calibration and adaptation make sense, `engines` how it can be decoded,
`published` which shapes of the literature it knows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewlines.attention.attend import Attend
from fewlines.attention.line_parallel import attend_under
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.errors import FewlinesError, look_up
from fewlines.geometry import Geometry
from fewlines.registry import discover
from fewlines.schema import Positive, Rate, Section, Share, check_fields

# Rows of a CPU batch that are drawn together. What a large batch needs at once, the C library maps
# and unmaps at every step, and then every page costs a fault.
CHUNK = 64


@dataclass(frozen=True)
class TokenSpec:
    """What a model's tokens are: `grid` `(h, w)` of an image, `codes` of the vocabulary, `classes`
    that images may have."""

    grid: tuple[int, int]
    codes: int
    classes: int

    @property
    def n_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        """Describe the tokens in a sentence."""
        height, width = self.grid
        return f"{height}×{width} tokens of {self.codes} codes in {self.classes} classes"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What is in the shape of every model of class numbers and codes.

    Attributes:
        grid: `(h, w)`, tokens of an image.
    """

    grid: tuple[Positive, Positive]
    codes: Positive
    classes: Positive

    def __post_init__(self) -> None:
        """Refuse what is no shape."""
        check_fields(self, "model")


class ModelSettings(Section):
    """What is trained, and how: keys that every family has."""

    family: str = Field("llamagen", description="the model family, a folder of fewlines/models")
    checkpoint: Path | None = Field(None, description="published weights, in place of training")
    start: Path | None = Field(
        None, description="weights that training goes on from, of the same shape"
    )
    steps: Positive = Field(960, description="of training")
    batch: Positive = Field(16, description="images of a step")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up; then linear decay to 0")
    muon_rate: Rate = Field(0.02, description="peak learning rate of the blocks' matrices")
    adamw_rate: Rate = Field(4e-3, description="peak learning rate of everything else")
    class_dropout: Share = Field(0.1, description="share of rows trained without their class")

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """What the reader of the checkpoint is told beside its name."""
        return {}

    def make_shape(self, spec: TokenSpec) -> Any:
        """Make the shape of the model that is trained on such tokens.

        Args:
            spec: the tokens.
        """
        raise NotImplementedError

    @model_validator(mode="after")
    def _sizes_make_a_shape(self) -> ModelSettings:
        if type(self) is not ModelSettings:  # which is of no family
            try:
                self.make_shape(TokenSpec((1, 1), 1, 1))
            except FewlinesError as error:
                raise ValueError(str(error)) from None
        return self


class State(ABC):
    """What a model keeps of a batch of images while it draws them, a token a step."""

    position = 0  # of the token that goes in next, the prefix counted

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes that are kept for the batch."""

    @property
    def signature(self) -> tuple[object, ...]:
        """What the host decides of a step: those of equal signature are the same operations on the
        same memory."""
        return ()

    @abstractmethod
    def start(self, labels: Tensor) -> Tensor:
        """Read the prefix.

        Args:
            labels: class numbers `(B,)`.

        Returns:
            Logits `(B, V)` of the first token.
        """

    def advance(self, step: int) -> None:
        """Go to image token `step`, which `forward` is given next: the host's part of a step. Here
        of a state that counts no prefix."""
        self.position = step

    @abstractmethod
    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read a token: the device's part of a step.

        Args:
            codes: `(B,)`.
            position: `State.position`, or a tensor `(1,)` that holds it in a CUDA graph.

        Returns:
            Logits `(B, V)` of the next token.
        """

    def step(self, step: int, codes: Tensor) -> Tensor:
        """Read the codes `(B,)` of image token `step`; returns logits `(B, V)` of the next."""
        self.advance(step)
        return self.forward(codes, self.position)


class Recomputation(State):
    """Nothing is kept but the codes: every step runs the whole image again, the naive way."""

    def __init__(self, model: Model, rows: int) -> None:
        """Begin with an image of zeros.

        Args:
            model: whose parallel forward runs at every step.
            rows: of the batch.
        """
        self.model = model
        shape = (rows, model.spec.n_tokens)
        self.codes = torch.zeros(shape, dtype=torch.long, device=model.device)

    @property
    def bytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes

    def start(self, labels: Tensor) -> Tensor:
        """Logits `(B, V)` of the first token."""
        self.labels, self.order = labels, self.model.order.tolist()
        return self.model.teacher_forced(labels, self.codes)[:, self.order[0]]

    def forward(self, codes: Tensor, position: int | Tensor) -> Tensor:
        """Read codes `(B,)`; logits `(B, V)` of the next token."""
        read, predicted = self.order[int(position)], self.order[int(position) + 1]
        self.codes[:, read] = codes
        return self.model.teacher_forced(self.labels, self.codes)[:, predicted]


class Model(nn.Module, ABC):
    """Class numbers and codes in raster order → logits of the next code.

    Attributes:
        name: of the family, as `model.family` writes it.
        Settings: its keys of the configuration.
        Shape: a frozen dataclass with `grid`, `codes` and `classes` among its fields, such as a
            `ModelShape`.
        caption_dim: numbers of a feature, of a model that draws from a caption's features; 0 where
            it draws from a class.
        raster: whether it draws line by line; one that does not completes no image.
        any_grid: whether its weights serve another grid: none of them is of a place.
        has_kv_cache: whether it keeps keys and values that a cache policy can limit.
        engines: ways of decoding with everything kept, the best first.
        parts: what adaptation may train, as parts of parameters' names.
        published: shapes of the literature, by name.
        Cost: its cost model, a class as `llamagen.cost.Decode`; None where nobody has made one.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[ModelSettings]]
    Shape: ClassVar[type[Any]]
    caption_dim: int = 0
    raster: ClassVar[bool] = True
    any_grid: ClassVar[bool] = True
    has_kv_cache: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("lean", "naive")
    parts: ClassVar[Mapping[str, str]] = {"all": ""}
    published: ClassVar[Mapping[str, Any]] = {}
    Cost: ClassVar[Any] = None
    shape: Any

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights that training begins with."""

    @abstractmethod
    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Any = None) -> Tensor:
        """Predict every code from those before it.

        Args:
            labels: class numbers `(B,)`.
            codes: `(B, N)`.
            memory: what `limit` made of a cache; None keeps everything.

        Returns:
            Logits `(B, N, V)`.
        """

    @abstractmethod
    def begin(self, rows: int, cache: Cache | Schedule, **how: Any) -> State:
        """Begin a batch of images.

        Args:
            rows: of the batch.
            cache: what is retained; `full` where the family has no cache to limit.
            how: `storage`, the precision that what is kept is kept in, and `engine`; `naive` is
                not asked for, as it keeps nothing (`Recomputation`).
        """

    @property
    def spec(self) -> TokenSpec:
        """The tokens that it was made for."""
        return TokenSpec(self.shape.grid, self.shape.codes, self.shape.classes)

    @property
    def order(self) -> Tensor:
        """The places `(N,)` of an image's tokens, counted line by line, as they are drawn."""
        return torch.arange(self.spec.n_tokens)

    @property
    def null_class(self) -> int:
        """The class number that stands for no class."""
        return int(self.shape.classes)

    def blank(self, labels: Tensor) -> Tensor:
        """Make what stands for no condition beside conditions, row by row: for guidance."""
        return torch.full_like(labels, self.null_class)

    def group(self, conditions: Any) -> list[tuple[Model, Tensor, Tensor]]:
        """Group what images are drawn from into batches of one form.

        Args:
            conditions: class numbers `(n,)`.

        Returns:
            The model that draws a group, its conditions, and their numbers.
        """
        return [(self, conditions, torch.arange(len(conditions)))]

    @property
    def has_null_class(self) -> bool:
        """Whether it can draw without a class, which guidance needs."""
        return True

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what lies between its products."""
        return next(self.parameters()).dtype

    def limit(self, cache: Cache) -> Any:
        """Make the `memory` with which `teacher_forced` sees what decoding under a cache sees.

        Args:
            cache: what is retained.

        Raises:
            FewlinesError: the family has nothing that such a cache could limit.
        """
        if cache.policy.name != "full":
            raise FewlinesError(f"cache: {self.name} has no key-value cache; write policy: full")
        return None

    def count_entries(self, cache: Cache) -> float:
        """Count what a head may hold under a cache; NaN where there are no heads."""
        return float("nan")

    def count_bytes(self, cache: Cache | Schedule, rows: int, storage: torch.dtype) -> float:
        """Count the bytes that are kept for a batch.

        Args:
            cache: what is retained.
            rows: of the batch.
            storage: what it is kept in.
        """
        return self.begin(rows, cache, storage=storage).bytes

    def count_read_bytes(self, cache: Cache, rows: int, storage: torch.dtype) -> float:
        """Count the bytes of it that a token reads, the mean over an image: here all of them.

        Args:
            cache: what is retained.
            rows: of the batch.
            storage: what it is kept in.
        """
        return self.count_bytes(cache, rows, storage)

    def prepare(self, dtype: torch.dtype, rows: int, *, consume: bool = False) -> Model:
        """Make the model ready for decoding.

        Args:
            dtype: what its products are computed in.
            rows: of the batches to come.
            consume: its own weights may be taken apart, so that there is never more than one copy.
        """
        return self if dtype == self.dtype else copy.deepcopy(self).to(dtype)

    @classmethod
    def draw(cls, shape: Any, precision: torch.dtype, generator: torch.Generator) -> Model:
        """Make a model with random weights, for measuring cost.

        Args:
            shape: of the model.
            precision: of its matrices.
            generator: draws them.
        """
        model = cls(shape)
        model.initialise(generator)
        return model.to(precision).eval().requires_grad_(False)

    @classmethod
    def read_checkpoint(cls, path: Path, **how: Any) -> Model:
        """Read published weights.

        Args:
            path: the file.
            how: what the file does not say: `shape`, the name of a published one, `side`, tokens of
                a side of its images, `heads`, and `part`, which of several models it holds.

        Raises:
            FewlinesError: the file is not what it should be, or the family has no such files.
        """
        raise FewlinesError(f"{path}: the family '{cls.name}' knows no published checkpoints")

    def group_parameters(self) -> list[dict[str, Any]]:
        """Group what is trained: `params`, the `optimizer` (`muon` or `adamw`), and for Muon
        `split`, the row counts of matrices that one parameter fuses."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "optimizer": "adamw"}]

    def group_for_muon(
        self, split: dict[str, list[int]], but: str = "-", also: tuple[str, ...] = ()
    ) -> list[dict[str, Any]]:
        """Group as `group_parameters`: Muon for the matrices and convolutions of `layers`, AdamW
        for the rest.

        Args:
            split: by the last name of a module, the rows of the matrices that its weight fuses.
            but: the last name of modules that are the rest's.
            also: names of modules outside `layers` that are Muon's.
        """
        whole: list[Tensor] = []
        fused: dict[str, list[Tensor]] = {name: [] for name in split}
        rest: list[Tensor] = []
        for name, parameter in self.named_parameters():
            module = name.removesuffix(".weight")
            last = module.rpartition(".")[2]
            muon = module in also or ("layers." in name and last != but)
            if not parameter.requires_grad:
                continue
            if not muon or module == name or parameter.ndim < 2:
                rest.append(parameter)
            else:
                fused.get(last, whole).append(parameter)
        return [
            {"params": whole, "optimizer": "muon"},
            *(
                {"params": params, "optimizer": "muon", "split": split[name]}
                for name, params in fused.items()
            ),
            {"params": rest, "optimizer": "adamw"},
        ]

    def count_training_flops(self) -> float | None:
        """Count the operations of training on one image; None where nobody has."""
        return None


class AttentionModel(Model):
    """A model that runs layer by layer and takes its attention from its caller: with it come every
    policy, allocation and instrument, calibration and adaptation."""

    has_kv_cache = True
    engines = ("lean", "stock")

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Grid, prefix, layers and key-value heads."""

    @abstractmethod
    def embed(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Embed the prefix and all codes `(B, N)` but the last → `(B, P + N − 1, dim)`."""

    @abstractmethod
    def run_layers(
        self, x: Tensor, attend: Attend | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Run some layers on all positions.

        Args:
            x: `(B, P + N − 1, dim)`, from `embed` or from the layers before.
            attend: their attention; None is causal.
            first: layer to begin with.
            last: layer to stop before; None runs to the end.

        Returns:
            `(B, P + N − 1, dim)`.
        """

    @abstractmethod
    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(B, N, V)` of what has been through all layers."""

    def teacher_forced(self, labels: Tensor, codes: Tensor, memory: Attend | None = None) -> Tensor:
        """Predict every code `(B, N)` from those before it; logits `(B, N, V)`."""
        return self.read_out(self.run_layers(self.embed(labels, codes), memory))

    def limit(self, cache: Cache) -> Attend | None:
        """Make the attention that a cache limits; None where it keeps everything."""
        plan = cache.plan(self.geometry)
        return None if plan.is_full else attend_under(plan, self.device)

    def count_entries(self, cache: Cache) -> float:
        """Count the entries of a head, the prefix included, if all heads hold alike."""
        return self.geometry.prefix + cache.count_tokens(self.geometry)


def list_families() -> dict[str, type[Model]]:
    """List every family by its name."""
    return discover(Model, "fewlines.models")


def get_family(name: str) -> type[Model]:
    """Give the family of this name.

    Raises:
        FewlinesError: there is none; with those that exist.
    """
    return look_up(name, list_families(), "model family")


def find_published(name: str) -> tuple[type[Model], Any]:
    """Find a published shape and its family.

    Raises:
        FewlinesError: no family knows it; with those that are known.
    """
    known = {shape: family for family in list_families().values() for shape in family.published}
    family = look_up(name, known, "shape")
    return family, family.published[name]
