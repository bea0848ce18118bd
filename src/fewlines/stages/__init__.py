"""The stages of an experiment. Each reads files, writes files, and knows nothing of Snakemake.

`fewlines <stage>` runs one; its options are the parameters of the function. Outputs are written
under a temporary name and renamed, so a killed stage leaves nothing half-written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

# Where each stage is defined: a process imports no more than its own stage needs.
OF_MODULES = {
    "networks": ("fetch-data", "train-tokenizer", "train-classifier", "tokenize"),
    "models": ("train-model", "train-architecture", "adapt", "import-model", "import-tokens"),
    "calibrate": ("calibrate", "calibration-curve", "export-schedule"),
    "samples": ("generate", "gather"),
    "draw": ("draw",),
    "quality": ("measure-quality", "measure-reference", "find-nearest"),
    "likelihood": (
        "measure-model",
        "measure-likelihood",
        "measure-storage",
    ),
    "search": ("search-options", "baselines"),
    "cost": ("measure-cost", "measure-paper", "measure-architecture", "measure-training-cost"),
    "efficiency": ("measure-efficiency", "measure-policy-times", "efficiency"),
    "plan": ("plan",),
    "watch": ("watch",),
    "report": (
        *("tables", "likelihood-table", "lines-table", "paper-table", "quality-table"),
        *("architectures-table", "grids-table", "figures", "report"),
    ),
    "publish": ("publish", "fill-blocks", "list-stale", "correlate"),
}
# What each stage reads of an experiment, beside the caches that it is named: Snakemake runs a job
# again when any of it changes, and a stage that reads anything else fails. `task` is that of its
# row, `adapted` the model it is named, `searched` the options of the cache it is named. What is not
# here reads nothing.
ROWS = ("caches", "adaptation", "tasks", "paper", "model")
TABLES = (*ROWS, "name", "cost", "storage")
READS: dict[str, tuple[str, ...]] = dict.fromkeys(
    (name for names in OF_MODULES.values() for name in names), ()
) | {
    "train-tokenizer": ("tokenizer", "seed", "training"),
    "train-classifier": ("classifier", "seed"),
    "train-model": ("model", "seed", "precision", "training"),
    "train-architecture": ("architecture", "seed", "precision", "training"),
    "adapt": ("adapted", "seed", "precision", "training"),
    "calibrate": ("calibration",),
    "calibration-curve": (*ROWS, "calibration", "likelihood"),
    "export-schedule": ("calibration",),
    "generate": ("sampling", "precision", "storage", "task"),
    "measure-quality": ("quality", "sampling", "task"),
    "measure-reference": ("quality", "sampling"),
    "find-nearest": ("quality", "sampling"),
    "measure-model": ("likelihood",),
    "measure-likelihood": ("likelihood", "task"),
    "search-options": ("searched", "calibration"),
    "baselines": ("search",),
    "measure-storage": ("likelihood",),
    "measure-cost": ("cost", "precision", "storage", "sampling"),
    "measure-paper": ("paper", "precision", "storage", "sampling"),
    "measure-architecture": ("cost", "precision", "storage", "sampling"),
    "measure-training-cost": ("training_cost", "model"),
    "measure-efficiency": ("efficiency",),
    "measure-policy-times": ("efficiency",),
    "efficiency": ("efficiency",),
    "watch": ("sampling",),
    "tables": TABLES,
    "likelihood-table": ROWS,
    "lines-table": ROWS,
    "paper-table": TABLES,
    "architectures-table": (*TABLES, "architectures", "sampling"),
    "quality-table": ROWS,
    "figures": (*TABLES, "sampling"),
    "report": (*TABLES, "sampling", "quality", "precision"),
    "publish": ("publish", "name", "precision"),
}
MODULES = {name: module for module, names in OF_MODULES.items() for name in names}


def load_stage(name: str) -> Callable[..., None]:
    """Load the function of a stage."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    stage: Callable[..., None] = getattr(module, name.replace("-", "_"))
    return stage
