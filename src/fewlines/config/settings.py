"""The sections of an experiment: each key, its default, its unit, its error message."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from fewlines.cache.spec import Cache, make_policy, parse_cache
from fewlines.config.caches import CacheName, CacheSettings, Measure, SeveralBudgets, SeveralCaches
from fewlines.data import SOURCES
from fewlines.errors import FewlinesError
from fewlines.models.base import ModelSettings, find_published, get_family
from fewlines.schema import (
    Number,
    Positive,
    Precision,
    Rate,
    Section,
    Seed,
    Share,
    Storage,
)

BASE = "base"  # the model that all others go on from
STEPS = "base+steps"  # the base model after as many more steps with a full cache


def _check_source(name: str) -> str:
    if name not in SOURCES:
        raise ValueError(f"unknown data source '{name}'; there are {', '.join(SOURCES)}")
    return name


def _check_shape(name: str) -> str:
    try:
        find_published(name)
    except FewlinesError as error:
        raise ValueError(str(error)) from None
    return name


class DataSettings(Section):
    """Where images come from."""

    source: Annotated[str, AfterValidator(_check_source)] = Field(
        "fashion-mnist", description=f"one of {', '.join(SOURCES)}"
    )
    path: Path | None = Field(None, description="folder with the source's files; null finds them")
    side: Positive | None = Field(None, description="pixels, of images that vary; null: 64")
    images: Positive | None = Field(
        None, description="how many there must be, training and test together; null: any number"
    )
    shards: Positive = Field(1, description="jobs that encode all images")
    tokens: Path | None = Field(
        None, description="of `fewlines import-tokens`, in place of images and a tokenizer"
    )

    @property
    def slug(self) -> str:
        """The source in file names, with the folder and the side that were asked for."""
        parts = [self.source]
        if self.path:
            place = self.path.resolve()
            name = re.sub(r"[^\w.+-]", "_", place.name, flags=re.ASCII)[:40]
            parts += [name, sha256(os.fsencode(place)).hexdigest()[:8]]
        parts += [str(self.side)] if self.side else []
        return "-".join(parts)


class TrainingSettings(Section):
    """How trainings are spread: the tokenizer's, the model's and those of adapted ones. The same
    batch gives the same steps, up to rounding, however it is spread."""

    gpus: Positive = Field(
        1, description="processes of a training, each with a GPU, or with a part of a processor"
    )
    shard: bool = Field(
        False, description="a model's weights and optimiser states are divided over them (FSDP2)"
    )
    accumulate: Positive = Field(1, description="parts in which a process computes its images")
    recompute: bool = Field(
        False, description="a model's layers are computed again for their gradients, to save memory"
    )
    compile: bool = Field(
        False, description="a model's layers are compiled by torch: faster on a GPU, after a minute"
    )


class ClassifierSettings(Section):
    """The network whose features images are compared by."""

    widths: tuple[Positive, ...] = Field(
        (32, 64, 128), min_length=1, description="channels of each stage"
    )
    features: Positive = Field(128, description="dimensions of the feature layer")
    steps: Positive = Field(940, description="of training")
    batch: Positive = Field(128, description="images of a step")
    learning_rate: Rate = Field(3e-3, description="peak, AdamW")


AdaptedName = Annotated[str, Field(pattern=r"^(adapted|scratch|base\+steps)[\w.+:-]*$")]


class AdaptedModel(Section):
    """Weights that go on from the base model's, with attention limited as these caches limit it."""

    caches: tuple[CacheName, ...] = Field(
        min_length=1, description="by their names; one of them is drawn for every step"
    )
    compared: tuple[CacheName, ...] = Field((), description="others that it is measured under")
    start: Literal["base", "scratch"] = Field(
        "base", description="scratch: new weights, trained as the base model was, but limited"
    )
    steps: Positive | None = Field(
        None, description="null: as many as the other models; from scratch, as the base model"
    )
    distil: Share = Field(0.0, description="weight of KL to the base model with a full cache")
    measure: Measure = Field(
        "all", description="likelihood: no images are drawn; samples: not shown with the headlines"
    )
    trained: str = Field("all", description="parameters: all, attention's, or the norms'")
    rank: int = Field(
        0, ge=0, description="of updates beside those matrices (LoRA); 0: the matrices themselves"
    )
    registers: int = Field(0, ge=0, description="learned tokens after the class that stay forever")

    @model_validator(mode="after")
    def _low_rank_has_matrices(self) -> AdaptedModel:
        if self.rank and (self.trained == "norms" or self.registers):
            raise ValueError(
                f"rank: {self.rank} updates matrices alone; write trained: all or attention, and "
                "no registers"
            )
        return self


def _drop_null(given: object) -> object:
    """An experiment file leaves out a model of config.yaml, which it extends, or all of them."""
    if not isinstance(given, dict):
        return {} if given is None else given
    return {name: model for name, model in given.items() if model is not None}


class AdaptationSettings(Section):
    """Training that goes on with the cache in the loop. `base+steps` is the baseline."""

    steps: Positive = Field(320, description="of training, beside the base model's")
    batch: Positive = Field(16, description="images of a step")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up; then linear decay to 0")
    muon_rate: Rate = Field(0.01, description="peak learning rate of the blocks' matrices")
    adamw_rate: Rate = Field(2e-3, description="peak learning rate of everything else")
    models: Annotated[dict[AdaptedName, AdaptedModel], BeforeValidator(_drop_null)] = Field(
        default={
            STEPS: AdaptedModel(caches=("full",), measure="samples"),
            "adapted:2lines": AdaptedModel(caches=("scheduled+merge-2lines",)),
        },
        description="by name: base+steps, adapted, adapted:2lines …; null: none, or not this one",
    )


TaskName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class TaskSettings(Section):
    """What a model draws beside images of a class from their first token on."""

    model: str = Field(BASE, description="whose weights: base, or one of adaptation.models")
    caches: tuple[CacheName, ...] = Field(min_length=1, description="by their names")
    labelled: bool = Field(True, description="false: the model is not told the class")
    prompt_lines: int = Field(0, ge=0, description="lines of test images that are to be completed")
    guidance: float | None = Field(
        None, ge=0, description="scale of classifier-free guidance; null: that of sampling"
    )
    temperature: Number | None = Field(None, description="null: that of sampling")
    against: Literal["test", "train"] = Field(
        "test", description="images that FID compares with; train: the last ones, as many as test"
    )


class SamplingSettings(Section):
    """How images are drawn, the same under every cache."""

    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="of the noise")
    samples: int = Field(1000, gt=1, description="images of a seed")
    batch: Positive = Field(250, description="images decoded together")
    shards: Positive = Field(2, description="jobs that share the images of one cache")
    temperature: Number = Field(
        0.9, description="logits are divided by it; 0 takes the likeliest code"
    )
    top_k: int = Field(0, ge=0, description="0 keeps every code")
    top_p: float = Field(1.0, gt=0, le=1, description="1 keeps every code")
    guidance: float = Field(1.0, ge=0, description="scale of classifier-free guidance; 1 is none")
    guided_tokens: int = Field(0, ge=0, description="first tokens that are guided; 0: all")


class QualitySettings(Section):
    """FID, KID, IS, precision and recall."""

    features: Literal["classifier", "efficientnet-lite0", "inception"] = Field(
        "classifier", description="what images are compared by"
    )
    reference: Path | None = Field(
        None, description="mu and sigma of features in a .npz, that FID compares with: ADM's file"
    )
    side: Positive | None = Field(
        None, description="pixels that images are brought to before they are compared"
    )
    neighbours: Positive = Field(3, description="k of precision and recall")
    kid_subsets: Positive = Field(100, description="that KID is the mean over")
    kid_subset_size: int = Field(500, gt=1, description="images; at most the samples of a seed")


class LikelihoodSettings(Section):
    """Nats per token of held-out images."""

    images: int = Field(500, gt=1, description="held-out images, the first of the test set")
    test_images: Positive | None = Field(2000, description="of the model's own figure; null: all")
    batch: Positive = Field(50, description="images of a forward")


FOLDERS = {"base", "cost", "efficiency", "figures", "logs"}  # of a run
FOLDERS |= {"reference", "search", "settings", "tables"}


def _check_architecture(name: str) -> str:
    if name in FOLDERS or name.startswith(("adapted", "base+", "scratch")):
        raise ValueError(f"'{name}' is the name of something else; write another")
    return name


def _read_model(given: object) -> object:
    """Keys are the family's: its own settings say what is wrong with them."""
    if isinstance(given, ModelSettings):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("family"), str):
        raise ValueError("write a family and its keys, as {family: pixelcnn, layers: 12}")
    try:
        made = get_family(given["family"]).Settings.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        message = f"{where}: {wrong['msg'].removeprefix('Value error, ')}"
        raise ValueError(message.removeprefix(": ")) from None
    except FewlinesError as error:
        raise ValueError(str(error)) from None
    if made.checkpoint or made.start:
        raise ValueError("it is trained here, from nothing; leave out checkpoint and start")
    return made


ArchitectureName = Annotated[
    str, Field(pattern=r"^[a-z][\w.+-]*$"), AfterValidator(_check_architecture)
]
Architecture = Annotated[SerializeAsAny[ModelSettings], BeforeValidator(_read_model)]


class CalibrationSettings(Section):
    """Where each head looks, for policies that go by it."""

    images: Positive = Field(300, description="training images, the first of the set")
    curve_images: Positive = Field(
        32, description="the next ones: what each head loses when it is limited"
    )
    batch: Positive = Field(50, description="images of a forward")
    transferred: Path | None = Field(
        None, description="calibration of another grid: what it is worth here, calibration_curve"
    )


class CostSettings(Section):
    """Time and memory of every cache."""

    batch: Positive = Field(32, description="images decoded together")
    repeats: Positive = Field(3, description="timed decodes of each configuration, interleaved")


class SearchSettings(Section):
    """The options of every policy at their best, on training images: `snakemake baselines`. The
    options of a policy are searched one after another, in the order they are listed."""

    images: int = Field(200, gt=1, description="training images, those after the calibration's")
    trials: Positive = Field(32, description="configurations of a policy at a budget, at most")
    budgets: SeveralBudgets = Field((), description="`{lines: [2, 3]}`, or a list of such")
    policies: dict[str, dict[str, tuple[Any, ...]]] = Field(
        default_factory=dict,
        description="values of options by policies: `{streaming: {sinks: [0, 4]}}`",
    )

    @model_validator(mode="after")
    def _buildable(self) -> SearchSettings:
        try:
            for cache, options in self.caches.values():
                for option, values in options.items():
                    for value in values:
                        make_policy(cache.policy.name, {option: value})
        except FewlinesError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def caches(self) -> dict[str, tuple[Cache, dict[str, tuple[Any, ...]]]]:
        """What is searched, by the names of its caches: each with the defaults of its policy, and
        the values of that policy's options."""
        every = [
            (parse_cache(f"{name}-{budget.slug}"), options)
            for name, options in self.policies.items()
            for budget in self.budgets
        ]
        return {cache.slug: (cache, options) for cache, options in every}


class EfficiencyRun(Section):
    """Every grid with every batch, and with the batch that fills every cap, is one setting."""

    shape: Annotated[str, AfterValidator(_check_shape)] = Field(
        "llamagen-b", description="a published shape: llamagen-b … llamagen-3b, janus-1b, lumina-7b"
    )
    grids: tuple[Positive, ...] = Field((64,), description="tokens of a side")
    batches: tuple[Positive, ...] = Field((), description="images decoded together")
    caps: tuple[Rate, ...] = Field((), description="GB that each row's batch may fill")
    precision: Precision = Field(
        "float32", description="of matrix products; auto: bfloat16 where there are instructions"
    )
    storage: Storage = Field("float32", description="of keys and values, stock caches excepted")
    engines: tuple[Literal["lean", "stock", "stock-graph", "hf-dynamic", "hf-static"], ...] = Field(
        ("lean", "stock"), description="that run the full cache"
    )
    caches: SeveralCaches = Field((), description="that run beside it")
    cache_engines: tuple[Literal["lean", "hf-fewlines"], ...] = Field(
        ("lean",),
        min_length=1,
        description="that run them: ours, or transformers with FewLinesCache",
    )
    full_run: bool = Field(False, description="decode whole images too, to check the sum of steps")


class EfficiencySettings(Section):
    """What decoding costs at published shapes."""

    repeats: Positive = Field(2, description="measurements of each row, interleaved")
    limit_seconds: Rate = Field(300, description="for one measurement")
    runs: tuple[EfficiencyRun, ...] = Field(
        (
            EfficiencyRun(
                batches=(16,), caches=(CacheSettings(policy="streaming", budget={"lines": 4}),)
            ),
        ),
        description="what is measured",
    )


class TrainingCostSettings(Section):
    """What a step of training costs with each cache in the loop, the model's shape on other grids
    and random codes: `snakemake training_cost`."""

    grids: tuple[Positive, ...] = Field((14, 32, 64), description="tokens of a side")
    tokens: Positive = Field(4096, description="of a step, at most, but one image at least")
    repeats: Positive = Field(5, description="steps of each, interleaved")
    caches: SeveralCaches = Field(
        (), description="beside the full one; calibrated ones know one grid only"
    )


class PaperSettings(Section):
    """The paper's table: full cache against few lines, where the cache is what fills memory."""

    caches: tuple[CacheName, ...] = Field(
        ("scheduled+merge-3lines",), description="by their names; none: no such table"
    )
    batch: Positive = Field(256, description="images decoded together")
    repeats: Positive = Field(3, description="timed decodes of each configuration, interleaved")

    @model_validator(mode="after")
    def _check_caches(self) -> PaperSettings:
        if "full" in self.caches:
            raise ValueError("caches: the full cache stands in it anyway; leave it out")
        return self
