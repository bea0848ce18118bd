"""The validated experiment, and what every rule shares."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote

from fewlines.config import BASE, dump_experiment, validate_experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_text
from fewlines.bench.efficiency import make_settings

try:
    EXPERIMENT = validate_experiment(config)
except FewlinesError as error:
    sys.exit(f"fewlines: {error}")

for key, path in EXPERIMENT.given_files.items():
    if not path.exists():
        sys.exit(
            f"fewlines: {key}: {path} does not exist; this experiment begins with it"
        )

RUN = f"results/{EXPERIMENT.name}"
DATA = f"results/data/{EXPERIMENT.data.slug}.safetensors"
TOKENS = EXPERIMENT.data.tokens or f"{RUN}/tokens.safetensors"
CACHES = list(EXPERIMENT.cache_by_slug)
ADAPTED = EXPERIMENT.adapted_models
ROWS = EXPERIMENT.rows  # (model, cache)
DRAWN = [row for row in ROWS if EXPERIMENT.is_drawn(row[1], row[0])]
SHOWN = [row for row in ROWS if EXPERIMENT.is_shown(row[1], row[0])]
HAS_KV = (
    EXPERIMENT.family.has_kv_cache
)  # calibration, policies and adaptation make sense

# Stages read the experiment with every default and override written out. Rules take it as an
# `ancient` input: a changed key reruns those that name its section under `params`, and no others.
# What runs nothing leaves it alone: another run may be reading it.
RESOLVED = f"{RUN}/experiment.yaml"
DRY = {"-n", "--dry-run", "--dryrun", "--lint", "--unlock"} & set(sys.argv)
if not os.path.exists(RESOLVED) or (
    not DRY and Path(RESOLVED).read_text() != dump_experiment(EXPERIMENT)
):
    write_text(Path(RESOLVED), dump_experiment(EXPERIMENT))


envvars:
    "PATH",


# The stages are commands of the environment that runs Snakemake, activated or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


# Snakemake sets OMP_NUM_THREADS to a job's threads. numba makes a pool of its own, and those of its
# threads that are not asked to work spin: two samplers of one thread took half of each other's time.
# A prefix of one's own replaces Snakemake's, by which a job fails where its first command does.
STAGES = os.path.join(workflow.basedir, "workflow/scripts/stages.py")
FORKED = f"{quote(sys.executable)} {quote(STAGES)} run"
shell.prefix(
    "set -euo pipefail; export NUMBA_NUM_THREADS=${{OMP_NUM_THREADS:-1}}; "
    'fewlines() {{ if [ -S "${{FEWLINES_STAGES:-}}" ]; '
    f'then {FORKED} "$FEWLINES_STAGES" "$@"; '
    'else command fewlines "$@"; fi; }}; '
)


# Jobs of this machine are forks of one process that has imported torch; those that run in an
# environment of their own are not.
onstart:
    if not workflow.deployment_settings.deployment_method and hasattr(
        os, "pidfd_open"
    ):
        place = os.path.join(tempfile.mkdtemp(prefix="fewlines-"), "socket")
        command = [sys.executable, STAGES, "serve", place]
        workflow.stages = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not os.path.exists(place) and workflow.stages.poll() is None:
            time.sleep(0.01)
        os.environ.update(FEWLINES_STAGES=place)


scattergather:
    shard=EXPERIMENT.sampling.shards,


wildcard_constraints:
    cache="|".join(map(re.escape, CACHES)),
    model="|".join(map(re.escape, dict(ROWS))),
    adapted="|".join(map(re.escape, ADAPTED)) or "none",


# Of jobs that take every core: one after another, before those of one core, which then run side by
# side to the end. Taken in turns, a core would wait at each change.
ALONE = 1


def settings(*sections):
    """The values whose change must rerun a rule."""
    return {name: EXPERIMENT.model_dump(mode="json")[name] for name in sections}


def adaptation(wildcards):
    """The values whose change must train an adapted model again."""
    model = EXPERIMENT.get_adapted(wildcards.adapted)
    return {
        "training": EXPERIMENT.get_training(model).model_dump(mode="json"),
        "model": model.model_dump(mode="json", exclude={"compared"}),
    }


def of(rows, pattern):
    """The files of some rows, each a model and a cache."""
    return [
        f"{RUN}/{pattern.format(model=model, cache=cache)}" for model, cache in rows
    ]


# Trained where it is what images are compared by.
CLASSIFIER = (
    [f"{RUN}/classifier.safetensors"]
    if EXPERIMENT.quality.features == "classifier"
    else []
)


def classifier_option(wildcards, input):
    return f"--classifier {input.classifier}" if input.classifier else ""


def run_folder(wildcards, input):
    """The folder of the run, from the experiment that lies in it."""
    return os.path.dirname(input.config)


def weights(wildcards):
    """The weights of a row's model; tasks have the base model's."""
    return f"{RUN}/{EXPERIMENT.get_weights(wildcards.model)}/model.safetensors"


def task(wildcards):
    """The values whose change must draw and measure a task again."""
    found = EXPERIMENT.get_task(wildcards.model)
    return found and found.model_dump(mode="json", exclude={"caches"})


def calibration(wildcards):
    """The calibration, for caches that go by one."""
    return calibration_for([getattr(wildcards, "cache", EXPERIMENT.paper_cache)])


def calibration_for(slugs):
    """The file with all that these caches go by."""
    needs = {EXPERIMENT.get_cache(slug).requires for slug in slugs}
    if "band losses" in needs:
        return [f"{RUN}/{BASE}/bands.safetensors"]
    return [f"{RUN}/{BASE}/calibration.safetensors"] if needs - {""} else []


def calibration_option(wildcards, input):
    return f"--calibration {input.calibration}" if input.calibration else ""
