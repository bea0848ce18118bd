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
    "models": ("train-model", "adapt", "import-model", "import-tokens"),
    "calibrate": ("calibrate", "calibration-curve", "export-schedule"),
    "samples": ("generate", "gather"),
    "quality": ("measure-quality", "measure-reference"),
    "likelihood": (
        "measure-model",
        "measure-likelihood",
        "measure-on-training",
        "measure-storage",
    ),
    "cost": ("measure-cost", "measure-training-cost"),
    "efficiency": ("measure-efficiency", "measure-policy-times", "efficiency"),
    "plan": ("plan",),
    "watch": ("watch",),
    "report": ("tables", "likelihood-table", "quality-table", "figures", "report"),
    "publish": ("publish", "fill-blocks"),
}
MODULES = {name: module for module, names in OF_MODULES.items() for name in names}


def load_stage(name: str) -> Callable[..., None]:
    """Load the function of a stage."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    stage: Callable[..., None] = getattr(module, name.replace("-", "_"))
    return stage
