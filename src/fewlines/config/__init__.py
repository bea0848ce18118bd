"""The experiment: its keys (`settings`, `experiment`), read and written (`reading`)."""

from fewlines.config.experiment import Experiment
from fewlines.config.reading import dump_experiment, load_experiment, validate_experiment
from fewlines.config.settings import (
    BASE,
    STEPS,
    AdaptedModel,
    CacheSettings,
    ClassifierSettings,
    EfficiencyRun,
    EfficiencySettings,
    ModelSettings,
    Precision,
    QualitySettings,
    SamplingSettings,
    Storage,
    TaskSettings,
    TokenizerSettings,
    TrainingCostSettings,
)

__all__ = [
    "BASE",
    "STEPS",
    "AdaptedModel",
    "CacheSettings",
    "ClassifierSettings",
    "EfficiencyRun",
    "EfficiencySettings",
    "Experiment",
    "ModelSettings",
    "Precision",
    "QualitySettings",
    "SamplingSettings",
    "Storage",
    "TaskSettings",
    "TokenizerSettings",
    "TrainingCostSettings",
    "dump_experiment",
    "load_experiment",
    "validate_experiment",
]
