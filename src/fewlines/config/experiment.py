"""The experiment as a whole: its sections, what must agree between them, and what it measures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, model_validator

from fewlines.cache.placement import Cache
from fewlines.config.settings import (
    BASE,
    STEPS,
    AdaptationSettings,
    AdaptedModel,
    CacheSettings,
    CalibrationSettings,
    ClassifierSettings,
    CostSettings,
    DataSettings,
    EfficiencySettings,
    LikelihoodSettings,
    Measure,
    ModelSettings,
    PaperSettings,
    Precision,
    QualitySettings,
    Rate,
    SamplingSettings,
    Section,
    Storage,
    TaskName,
    TaskSettings,
    TokenizerSettings,
    TrainingCostSettings,
)
from fewlines.errors import FewlinesError


def _default_caches() -> tuple[CacheSettings, ...]:
    def cache(policy: str, k: int, **options: Any) -> CacheSettings:
        return CacheSettings(policy=policy, budget={"lines": k}, **options)

    drawn = [(policy, 3) for policy in ("lines", "streaming", "linear")]
    ranked = [(policy, 2) for policy in ("lines", "streaming")]
    return (
        CacheSettings(policy="full"),
        *(cache(*row) for row in [*drawn, ("linear", 2)]),
        *(cache("scheduled", k, fold=True) for k in (3, 2)),
        *(cache(*row, measure="likelihood") for row in ranked),
        *(
            cache("scheduled", k, fold=True, split="calibrated", measure="likelihood")
            for k in (3, 2, 1)
        ),
    )


class Experiment(Section):
    """Everything that `snakemake` reads: the sections, the caches, and what must agree."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] = Field(
        "fashion-mnist", description="results are written to results/<name>/"
    )
    seed: int = Field(0, ge=0, description="of every training")
    precision: Precision = Field(
        "float32", description="of matrix products; auto: bfloat16 where there are instructions"
    )
    storage: Storage = Field("float32", description="what keys and values are kept in")
    checkpoint_seconds: Rate = Field(60, description="time between checkpoints of a training")
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    classifier: ClassifierSettings = ClassifierSettings()
    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    sampling: SamplingSettings = SamplingSettings()
    tasks: dict[TaskName, TaskSettings] = Field(
        default_factory=dict, description="by name: unconditional, completion …"
    )
    quality: QualitySettings = QualitySettings()
    likelihood: LikelihoodSettings = LikelihoodSettings()
    cost: CostSettings = CostSettings()
    paper: PaperSettings = PaperSettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    training_cost: TrainingCostSettings = TrainingCostSettings()
    caches: tuple[CacheSettings, ...] = Field(default_factory=_default_caches, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        slugs = [cache.build().slug for cache in self.caches]
        if "full" not in slugs:
            raise ValueError("caches: add {policy: full}; every cache is measured against it")
        twice = {slug for slug in slugs if slugs.count(slug) > 1}
        if twice:
            raise ValueError(f"caches: {', '.join(sorted(twice))} is listed more than once")
        if self.paper.cache not in slugs:
            raise ValueError(
                f"paper.cache: {self.paper.cache} is not one of caches: {', '.join(slugs)}"
            )
        if not self.shown("full") or not self.shown(self.paper.cache):
            raise ValueError(f"caches: full and {self.paper.cache} need 'measure: all'")
        for name, model in self.adaptation.models.items():
            unknown = [slug for slug in (*model.caches, *model.compared) if slug not in slugs]
            if unknown:
                raise ValueError(
                    f"adaptation.models.{name}: {', '.join(unknown)} is not one of caches: "
                    f"{', '.join(slugs)}"
                )
        for name, task in self.tasks.items():
            drawn = [slug for slug in slugs if self.drawn(slug)]
            unknown = [slug for slug in task.caches if slug not in drawn]
            if unknown:
                raise ValueError(
                    f"tasks.{name}: images are not drawn under {', '.join(unknown)}, "
                    f"but {', '.join(drawn)}"
                )
            if not task.labelled and self._guidance(task) != 1:
                raise ValueError(f"tasks.{name}: guidance needs a class; write labelled: true")
            if task.model not in (BASE, *self.adaptation.models):
                raise ValueError(
                    f"tasks.{name}.model: {task.model} is not {BASE} or one of adaptation.models: "
                    f"{', '.join(self.adaptation.models) or 'none'}"
                )
            if f"{task.model}:{name}" in self.adaptation.models:
                raise ValueError(f"tasks.{name}: {task.model}:{name} is the name of a model too")
        if self.quality.kid_subset_size > self.sampling.samples:
            raise ValueError("quality.kid_subset_size: must not exceed sampling.samples")
        if self.sampling.shards > self.sampling.samples:
            raise ValueError("sampling.shards: must not exceed sampling.samples")
        return self

    def drawn(self, slug: str, model: str = BASE) -> bool:
        """Whether a model's images are drawn under this cache."""
        return self._measure_of(slug, model) != "likelihood"

    def shown(self, slug: str, model: str = BASE) -> bool:
        """Whether a row is a headline: the cache's time is taken, its images are shown."""
        return self._measure_of(slug, model) == "all"

    def _measure_of(self, slug: str, model: str) -> Measure:
        """The lesser of what the cache and the model ask for; tasks are no headlines."""
        if self.task(model):
            asked: Measure = "samples"
        else:
            asked = "all" if model == BASE else self.adapted(model).measure
        return min([self._measured[slug], asked], key=get_args(Measure).index)

    def task(self, model: str) -> TaskSettings | None:
        """The task of a row's `<model>:<task>`; None for whole images of a class."""
        name = self.task_name(model)
        return self.tasks[name] if name else None

    def task_name(self, model: str) -> str | None:
        """The name of a row's task; None for whole images of a class."""
        if model in self._task_names or not model.startswith(f"{BASE}:"):
            return self._task_names.get(model)
        known = ", ".join(self.tasks) or "none"
        raise FewlinesError(f"no task '{model}' in this experiment; it has {known}")

    @cached_property
    def _task_names(self) -> dict[str, str]:
        return {f"{task.model}:{name}": name for name, task in self.tasks.items()}

    def weights(self, model: str) -> str:
        """Whose weights a row is measured with: a task says it."""
        task = self.task(model)
        return task.model if task else model

    def sampling_of(self, model: str) -> SamplingSettings:
        """How a row's images are drawn."""
        task = self.task(model)
        return self.sampling.model_copy(update={"guidance": self._guidance(task)} if task else {})

    def _guidance(self, task: TaskSettings) -> float:
        return self.sampling.guidance if task.guidance is None else task.guidance

    @cached_property
    def _measured(self) -> dict[str, Measure]:
        return dict(zip(self.cache_by_slug, (cache.measure for cache in self.caches), strict=True))

    def adapted(self, name: str) -> AdaptedModel:
        """The adapted model of this name."""
        models = self.adaptation.models
        if name not in models:
            known = ", ".join(models) or "none"
            raise FewlinesError(f"no adapted model '{name}' in this experiment; it has {known}")
        return models[name]

    def baseline(self, name: str) -> str | None:
        """Whom an adapted model is compared with: the base model, trained as a whole for as many
        more steps with a full cache, by the same loss if there is one; else `base+steps`; None
        without that either. One from scratch is compared with the base model."""
        adapted, models = self.adapted(name), self.adaptation.models
        if adapted.start == "scratch":
            return BASE
        steps = self.continued(adapted).steps
        same = [
            other
            for other, model in models.items()
            if other.startswith(STEPS) and self.continued(model).steps == steps
        ]
        same.sort(key=lambda other: models[other].distil != adapted.distil)
        return next(iter(same), STEPS if STEPS in models else None)

    def continued(self, adapted: AdaptedModel) -> ModelSettings:
        """The settings of an adapted model's training."""
        if adapted.start == "scratch":
            return self.model.model_copy(update={"steps": adapted.steps or self.model.steps})
        changed = self.adaptation.model_dump(exclude={"models"})
        changed |= {"steps": adapted.steps or self.adaptation.steps}
        return self.model.model_copy(update=changed)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What is measured: `(model, cache)`, the base model under every cache, adapted ones under
        those they were trained and are compared with, and the tasks as `<model>:<task>`. File
        names call a model as it is here."""
        adapted = [
            (name, slug)
            for name, model in self.adaptation.models.items()
            for slug in dict.fromkeys((*model.caches, *model.compared))
        ]
        tasks = [
            (model, slug)
            for model, name in self._task_names.items()
            for slug in dict.fromkeys(self.tasks[name].caches)
        ]
        return [(BASE, slug) for slug in self.cache_by_slug] + adapted + tasks

    @property
    def given_files(self) -> dict[str, Path]:
        """Files that the experiment begins with and does not make, by the keys that name them."""
        named = {
            "data.tokens": self.data.tokens,
            "tokenizer.weights": self.tokenizer.weights,
            "model.checkpoint": self.model.checkpoint,
            "model.start": self.model.start,
            "calibration.carried": self.calibration.carried,
        }
        return {key: path for key, path in named.items() if path}

    @cached_property
    def cache_by_slug(self) -> dict[str, Cache]:
        return {cache.slug: cache for cache in (settings.build() for settings in self.caches)}

    def cache(self, slug: str) -> Cache:
        """The cache that file names call `slug`."""
        caches = self.cache_by_slug
        if slug not in caches:
            raise FewlinesError(f"no cache '{slug}' in this experiment; it has {', '.join(caches)}")
        return caches[slug]
