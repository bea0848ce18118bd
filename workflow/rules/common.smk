"""The validated experiment, and what every rule shares."""

import os
import re
import sys
from pathlib import Path

from fewlines.config import dump_experiment, validate_experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_text
from fewlines.measure.efficiency import settings_of

try:
    EXPERIMENT = validate_experiment(config)
except FewlinesError as error:
    sys.exit(f"fewlines: {error}")

RUN = f"results/{EXPERIMENT.name}"
DATA = f"results/data/{EXPERIMENT.data.source}.safetensors"
CACHES = list(EXPERIMENT.cache_by_slug)

# Stages read the experiment with every default and override written out. Rules take it as an
# `ancient` input: a changed key reruns those that name its section under `params`, and no others.
RESOLVED = f"{RUN}/experiment.yaml"
if not os.path.exists(RESOLVED) or Path(RESOLVED).read_text() != dump_experiment(
    EXPERIMENT
):
    write_text(Path(RESOLVED), dump_experiment(EXPERIMENT))


envvars:
    "PATH",


# The stages are commands of the environment that runs Snakemake, activated or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


scattergather:
    shard=EXPERIMENT.sampling.shards,


wildcard_constraints:
    cache="|".join(map(re.escape, CACHES)),


def settings(*sections):
    """The values whose change must rerun a rule."""
    return {name: EXPERIMENT.model_dump(mode="json")[name] for name in sections}


def run_folder(wildcards, input):
    """The folder of the run, from the experiment that lies in it."""
    return os.path.dirname(input.config)


def calibration(wildcards):
    """The calibration, for caches that go by one."""
    slug = getattr(wildcards, "cache", EXPERIMENT.paper.cache)
    needed = EXPERIMENT.cache(slug).needs_calibration
    return [f"{RUN}/calibration.safetensors"] if needed else []


def calibration_option(wildcards, input):
    return f"--calibration {input.calibration}" if input.calibration else ""
