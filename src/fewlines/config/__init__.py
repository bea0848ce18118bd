"""The experiment: what its keys are (`settings`), and how it is read and written (`reading`)."""

from fewlines.config.describing import describe_config
from fewlines.config.reading import dump_experiment, load_experiment, validate_experiment
from fewlines.config.settings import (
    BASE,
    STEPS,
    AdaptedModel,
    ClassifierSettings,
    EfficiencyRun,
    EfficiencySettings,
    Experiment,
    ModelSettings,
    Precision,
    QualitySettings,
    SamplingSettings,
    Storage,
    TokenizerSettings,
)

__all__ = [
    "BASE",
    "STEPS",
    "AdaptedModel",
    "ClassifierSettings",
    "EfficiencyRun",
    "EfficiencySettings",
    "Experiment",
    "ModelSettings",
    "Precision",
    "QualitySettings",
    "SamplingSettings",
    "Storage",
    "TokenizerSettings",
    "describe_config",
    "dump_experiment",
    "load_experiment",
    "validate_experiment",
]
