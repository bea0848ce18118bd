"""The stages of an experiment. Each reads files, writes files, and knows nothing of Snakemake.

`fewlines <stage>` runs one; its options are the parameters of the function. Outputs are written
under a temporary name and renamed, so a killed stage leaves nothing half-written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

# Where each stage is defined: a process imports no more than its own stage needs.
MODULES = {
    "fetch-data": "networks",
    "train-tokenizer": "networks",
    "train-classifier": "networks",
    "tokenize": "networks",
    "train-model": "networks",
    "adapt": "networks",
    "import-model": "imports",
    "import-tokens": "imports",
    "calibrate": "calibrate",
    "calibrate-summaries": "calibrate",
    "calibration-curve": "calibrate",
    "export-schedule": "calibrate",
    "generate": "samples",
    "gather": "samples",
    "measure-quality": "quality",
    "measure-floors": "quality",
    "measure-model": "likelihood",
    "measure-likelihood": "likelihood",
    "measure-on-training": "likelihood",
    "measure-storage": "likelihood",
    "measure-cost": "cost",
    "measure-paper": "cost",
    "measure-efficiency": "efficiency",
    "measure-choices": "efficiency",
    "measure-training-cost": "efficiency",
    "measure-policy-times": "efficiency",
    "efficiency": "efficiency",
    "bench": "efficiency",
    "plan": "plan",
    "watch": "watch",
    "tables": "report",
    "likelihood-table": "report",
    "quality-table": "report",
    "figures": "report",
    "report": "report",
    "publish": "report",
    "publish-efficiency": "report",
    "publish-table": "report",
    "document-config": "report",
}


def load_stage(name: str) -> Callable[..., None]:
    """The function of a stage."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    stage: Callable[..., None] = getattr(module, name.replace("-", "_"))
    return stage
