"""The experiment: its keys (`settings`, `experiment`), read and written (`reading`)."""

from fewlines.config.experiment import Experiment
from fewlines.config.reading import (
    dump_experiment,
    load_experiment,
    read_yaml,
    validate_experiment,
)
from fewlines.config.settings import BASE, STEPS

__all__ = [
    "BASE",
    "STEPS",
    "Experiment",
    "dump_experiment",
    "load_experiment",
    "read_yaml",
    "validate_experiment",
]
