"""The experiment as a whole: its sections, what must agree between them, and what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from fewlines.cache.policy import CalibratedPolicy, StaticPolicy
from fewlines.cache.spec import Cache, parse_cache
from fewlines.config.agreement import find_disagreements
from fewlines.config.caches import DEFAULT_CACHES, CacheSettings, Measure, list_caches
from fewlines.config.settings import (
    BASE,
    STEPS,
    AdaptationSettings,
    AdaptedModel,
    Architecture,
    ArchitectureName,
    CalibrationSettings,
    ClassifierSettings,
    CostSettings,
    DataSettings,
    EfficiencySettings,
    LikelihoodSettings,
    PaperSettings,
    QualitySettings,
    SamplingSettings,
    SearchSettings,
    TaskName,
    TaskSettings,
    TrainingCostSettings,
    TrainingSettings,
)
from fewlines.config.tokenizer import TokenizerSettings
from fewlines.errors import FewlinesError
from fewlines.models.base import Model, ModelSettings, get_family
from fewlines.schema import Precision, Rate, Section, Seed, Storage


def _check_name(name: str) -> str:
    if name in ("reference", "data"):
        raise ValueError(f"results/{name} is not a run's; write another name")
    return name


class _Undeclared:
    """In place of a section that a stage did not say it reads."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, key: str) -> Any:
        raise AssertionError(f"a stage reads '{self.name}', which fewlines.stages.READS denies")

    def __hash__(self) -> int:
        return hash(self.value)  # there is none: it raises


class Experiment(Section):
    """Everything that `snakemake` reads: the sections, the caches, and what must agree."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$"), AfterValidator(_check_name)] = Field(
        "fashion-mnist", description="results are written to results/<name>/"
    )
    seed: Seed = Field(0, description="of every training")
    precision: Precision = Field(
        "float32", description="of matrix products; auto: bfloat16 where there are instructions"
    )
    storage: Storage = Field("float32", description="what keys and values are kept in")
    checkpoint_seconds: Rate = Field(60, description="time between checkpoints of a training")
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    classifier: ClassifierSettings = ClassifierSettings()
    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    architectures: dict[ArchitectureName, Architecture] = Field(
        default_factory=dict,
        description="models of other families on the same tokens, by name: {family: pixelcnn}",
    )
    sampling: SamplingSettings = SamplingSettings()
    tasks: dict[TaskName, TaskSettings] = Field(
        default_factory=dict, description="by name: unconditional, completion …"
    )
    quality: QualitySettings = QualitySettings()
    likelihood: LikelihoodSettings = LikelihoodSettings()
    cost: CostSettings = CostSettings()
    paper: PaperSettings = PaperSettings()
    search: SearchSettings = SearchSettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    training_cost: TrainingCostSettings = TrainingCostSettings()
    publish: dict[str, str] = Field(
        default_factory=dict,
        description="of `make study`: files that are tracked, and which of the run they are",
    )
    grids: tuple[Path, ...] = Field(
        (), description="tables of the same caches on other grids: what grows with the grid"
    )
    caches: Annotated[tuple[CacheSettings, ...], BeforeValidator(list_caches)] = Field(
        default=DEFAULT_CACHES,
        min_length=1,
        validate_default=True,
        description="what is compared; `full` always is",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for complaint in find_disagreements(self):
            raise ValueError(complaint)
        try:
            _ = self.cache_by_slug
        except FewlinesError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def family(self) -> type[Model]:
        """The family of the base model."""
        return get_family(self.model.family)

    def restrict(self, sections: Sequence[str]) -> Experiment:
        """Give an experiment of which a stage can read no more than it declares.

        Args:
            sections: as in `fewlines.stages.READS`.
        """
        _ = self.cache_by_slug, self.paper_caches  # known by name to all
        _ = self._task_names, self._model_names
        seen = {"checkpoint_seconds", *sections}
        seen |= {"tasks"} if "task" in seen else set()
        seen |= {"search"} if "searched" in seen else set()
        seen |= {"adaptation", "model"} if "adapted" in seen else set()
        seen |= {"architectures"} if "architecture" in seen else set()
        hidden = {name: _Undeclared(name) for name in type(self).model_fields if name not in seen}
        return self.model_copy(update=hidden)

    @cached_property
    def paper_caches(self) -> tuple[str, ...]:
        """The caches of the paper's comparison, the headline first; none where it is not made."""
        return self.paper.caches if self.family.has_kv_cache else ()

    @property
    def paper_rows(self) -> list[tuple[str, str]]:
        """The rows of the paper's comparison: the full cache and few lines, of the base model and
        of those adapted ones whose images are drawn."""
        compared = {"full", *self.paper_caches}
        models = (BASE, *self.adapted_models)
        return [
            (model, slug)
            for model, slug in self.rows
            if slug in compared and model in models and self.is_drawn(slug, model)
        ]

    @property
    def architecture_rows(self) -> list[tuple[str, str]]:
        """The rows of the comparison of architectures: models of other families beside all but
        tasks."""
        own = [row for row in self.rows if self.get_task(row[0]) is None]
        return own + [(name, "full") for name in self.architectures]

    @property
    def pictured_rows(self) -> list[tuple[str, str]]:
        """The rows whose images are shown: headlines, and the base model's in the paper's
        comparison."""
        compared = [row for row in self.paper_rows if row[0] == BASE]
        return [row for row in self.rows if self.is_shown(row[1], row[0]) or row in compared]

    def is_drawn(self, slug: str, model: str = BASE) -> bool:
        """Whether a model's images are drawn under this cache."""
        return self._get_measure(slug, model) != "likelihood"

    def is_shown(self, slug: str, model: str = BASE) -> bool:
        """Whether a row is a headline: the cache's time is taken, its images are shown."""
        return self._get_measure(slug, model) == "all"

    def _get_measure(self, slug: str, model: str) -> Measure:
        """The lesser of what the cache and the model ask for; tasks and other families are no
        headlines."""
        if self.get_task(model) or model in self.architecture_names:
            asked: Measure = "samples"
        else:
            asked = "all" if model == BASE else self.get_adapted(model).measure
        return min([self._measured[slug], asked], key=get_args(Measure).index)

    def get_task(self, model: str) -> TaskSettings | None:
        """Give the task of a row's `<model>:<task>`; None for whole images of a class."""
        name = self.get_task_name(model)
        return self.tasks[name] if name else None

    def get_task_name(self, model: str) -> str | None:
        """Give the name of a row's task; None for whole images of a class.

        Raises:
            FewlinesError: there is no such task.
        """
        if model in self._task_names or model in self._model_names:
            return self._task_names.get(model)
        known = ", ".join((*self._model_names, *self._task_names))
        raise FewlinesError(f"no row '{model}' in this experiment; it has {known}")

    @cached_property
    def architecture_names(self) -> tuple[str, ...]:
        """The models of other families."""
        return tuple(self.architectures)

    def get_architecture(self, name: str) -> ModelSettings:
        """Give the settings of a model of another family.

        Raises:
            FewlinesError: there is none of this name.
        """
        if name not in self.architectures:
            known = ", ".join(self.architectures) or "none"
            raise FewlinesError(f"no architecture '{name}' in this experiment; it has {known}")
        return self.architectures[name]

    @cached_property
    def _model_names(self) -> tuple[str, ...]:
        return (BASE, *self.adaptation.models, *self.architecture_names)

    @cached_property
    def _task_names(self) -> dict[str, str]:
        return {f"{task.model}:{name}": name for name, task in self.tasks.items()}

    def get_weights(self, model: str) -> str:
        """Give the model whose weights a row is measured with: a task says it."""
        task = self.get_task(model)
        return task.model if task else model

    def get_scored(self, model: str) -> str:
        """Give the row whose likelihood a row has: its model's, where a task neither hides the
        class nor begins with a part of the image."""
        task = self.get_task(model)
        own = task and (task.prompt_lines or not task.labelled)
        return model if own else self.get_weights(model)

    def get_sampling(self, model: str) -> SamplingSettings:
        """Give how a row's images are drawn."""
        task = self.get_task(model)
        asked = {"guidance": task.guidance, "temperature": task.temperature} if task else {}
        changed = {key: value for key, value in asked.items() if value is not None}
        return self.sampling.model_copy(update=changed)

    @cached_property
    def _measured(self) -> dict[str, Measure]:
        """What is measured under each cache: those that are not listed stand beside those that go
        on from them; the paper's are drawn under."""
        measured: dict[str, Measure] = dict.fromkeys(self.cache_by_slug, "likelihood")
        measured |= {cache.build().slug: cache.measure for cache in self.caches}
        for drawn in (self.paper_caches, *(task.caches for task in self.tasks.values())):
            for slug in drawn:
                if measured.get(slug) == "likelihood":  # a family may know the full cache alone
                    measured[slug] = "samples"
        measured["full"] = "all"
        return measured

    def get_adapted(self, name: str) -> AdaptedModel:
        """Give the adapted model of this name.

        Raises:
            FewlinesError: there is none.
        """
        models = self.adaptation.models
        if name not in models:
            known = ", ".join(models) or "none"
            raise FewlinesError(f"no adapted model '{name}' in this experiment; it has {known}")
        return models[name]

    def find_baseline(self, name: str) -> str | None:
        """Find the model whose full cache a model is compared with. Of the base model and of one
        from scratch it is the base model. Of an adapted one it is the base model, trained as a
        whole for as many more steps with a full cache, by the same loss if there is one; else
        `base+steps`; None without that either. Only one that is measured with a full cache
        counts."""
        if name == BASE:
            return BASE
        adapted, models = self.get_adapted(name), self.adaptation.models
        if adapted.start == "scratch":
            return BASE
        steps = self.get_training(adapted).steps
        known = {
            other: model
            for other, model in models.items()
            if other.startswith(STEPS) and "full" in (*model.caches, *model.compared)
        }
        same = [other for other, model in known.items() if self.get_training(model).steps == steps]
        same.sort(key=lambda other: models[other].distil != adapted.distil)
        return next(iter(same), STEPS if STEPS in known else None)

    def get_training(self, adapted: AdaptedModel) -> ModelSettings:
        """Give the settings of an adapted model's training."""
        if adapted.start == "scratch":
            return self.model.model_copy(update={"steps": adapted.steps or self.model.steps})
        changed = self.adaptation.model_dump(exclude={"models"})
        changed |= {"steps": adapted.steps or self.adaptation.steps}
        return self.model.model_copy(update=changed)

    @property
    def figures(self) -> tuple[str, ...]:
        """The pictures of a run, by name."""
        drawn = {
            "curves": self.family.has_kv_cache,
            "quality": True,
            "samples": True,
            "memory": bool(self.paper_caches),
            "lines": self.family.has_kv_cache,
            "heads": self.has_schedule,
        }
        return tuple(name for name, asked in drawn.items() if asked)

    @property
    def has_schedule(self) -> bool:
        """Whether calibration says the victims of some cache before anything is drawn."""
        return any(
            cache.requires and isinstance(cache.policy, StaticPolicy | CalibratedPolicy)
            for cache in self.cache_by_slug.values()
        )

    @property
    def adapted_models(self) -> list[str]:
        """The adapted models, where the family can be adapted to a cache."""
        return list(self.adaptation.models) if self.family.has_kv_cache else []

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What is measured: `(model, cache)`, the base model under every cache, adapted ones under
        those they were trained and are compared with, and the tasks as `<model>:<task>`. File
        names call a model as it is here. A family without a key-value cache has the full one."""
        adapted = [
            (name, slug)
            for name in self.adapted_models
            for model in [self.adaptation.models[name]]
            for slug in dict.fromkeys((*model.caches, *model.compared))
        ]
        tasks = [
            (model, slug)
            for model, name in self._task_names.items()
            for slug in dict.fromkeys(self.tasks[name].caches)
        ]
        rows = [(BASE, slug) for slug in self.cache_by_slug] + adapted + tasks
        return rows if self.family.has_kv_cache else [row for row in rows if row[1] == "full"]

    @property
    def given_files(self) -> dict[str, Path]:
        """Files that the experiment begins with and does not make, by the keys that name them."""
        named = {
            "data.tokens": self.data.tokens,
            "tokenizer.weights": self.tokenizer.weights,
            "model.checkpoint": self.model.checkpoint,
            "model.start": self.model.start,
            "quality.reference": self.quality.reference,
            "calibration.transferred": self.calibration.transferred,
            **{f"grids.{place}": path for place, path in enumerate(self.grids)},
        }
        return {key: path for key, path in named.items() if path}

    @cached_property
    def cache_by_slug(self) -> dict[str, Cache]:
        """The caches that are listed, and those that models, tasks and the paper's table name."""
        listed = {cache.slug: cache for cache in (settings.build() for settings in self.caches)}
        if not self.family.has_kv_cache:
            return {"full": listed["full"]}
        named = [slug for model in self.adaptation.models.values() for slug in model.caches]
        named += [slug for model in self.adaptation.models.values() for slug in model.compared]
        named += [slug for task in self.tasks.values() for slug in task.caches]
        named += self.paper.caches
        implied = {slug: parse_cache(slug) for slug in named if slug not in listed}
        return listed | {cache.slug: cache for cache in implied.values()}

    def get_cache(self, slug: str) -> Cache:
        """Give the cache that file names call `slug`.

        Raises:
            FewlinesError: there is none.
        """
        caches = self.cache_by_slug
        if slug not in caches:
            raise FewlinesError(f"no cache '{slug}' in this experiment; it has {', '.join(caches)}")
        return caches[slug]


@lru_cache
def make_schema(family: str) -> type[Experiment]:
    """Make the schema of experiments with a model family: its keys stand under `model`."""
    settings = get_family(family).Settings
    default = Field(default=settings(family=family))
    schema = create_model("Experiment", __base__=Experiment, model=(settings, default))
    schema.__doc__ = Experiment.__doc__
    return schema
