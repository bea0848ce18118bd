"""The validated experiment, and what every rule shares."""

import os
import re
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from shlex import quote

from fewlines.config import BASE, dump_experiment, load_experiment
from fewlines.errors import FewlinesError
from fewlines.files import digest_folder, write_text
from fewlines.stages import READS
from fewlines.bench.efficiency import make_settings

sys.path.insert(0, os.path.join(workflow.basedir, "workflow/scripts"))
from unlock import OWNER, describe_owner

try:
    # Snakemake forgets the first of two equal keys, and what family a model's keys are of.
    # Those of a command line come first here.
    given = workflow.overwrite_configfiles
    files = [*workflow.configfiles[len(given) :], *given]
    if workflow.config_settings.replace_workflow_config:
        files = given
    EXPERIMENT = load_experiment(map(Path, files), workflow.config_settings.config)
except FewlinesError as error:
    sys.exit(f"fewlines: {error}")

SHARED_FILES = not workflow.storage_settings.default_storage_provider
for key, path in EXPERIMENT.given_files.items():
    if SHARED_FILES and not path.exists():
        sys.exit(
            f"fewlines: {key}: {path} does not exist; this experiment begins with it"
        )

for path in (workflow.basedir, *map(str, EXPERIMENT.given_files.values())):
    if set("{}") & set(path):
        sys.exit(
            f"fewlines: {path} has braces in its name, which Snakemake takes for wildcards; "
            "rename it"
        )

RUN = f"results/{EXPERIMENT.name}"
DATA = f"results/data/{EXPERIMENT.data.slug}.safetensors"
TOKENS = EXPERIMENT.data.tokens or f"{RUN}/tokens.safetensors"
CACHES = list(EXPERIMENT.cache_by_slug)
ADAPTED = EXPERIMENT.adapted_models
ROWS = EXPERIMENT.rows  # (model, cache)
DRAWN = [row for row in ROWS if EXPERIMENT.is_drawn(row[1], row[0])]
SHOWN = [row for row in ROWS if EXPERIMENT.is_shown(row[1], row[0])]
OTHERS = [(name, "full") for name in EXPERIMENT.architectures]  # of other families
HAS_KV = (
    EXPERIMENT.family.has_kv_cache
)  # calibration, policies and adaptation make sense

CALIBRATED = any(cache.requires for cache in EXPERIMENT.cache_by_slug.values())

# What stages read: written when a run starts, under Snakemake's lock and a name that says what is in
# it, so that nothing changes what a job was planned with. Parsing writes nothing.
RESOLVED = dump_experiment(EXPERIMENT)
SETTINGS = f"{RUN}/settings/{sha256(RESOLVED.encode()).hexdigest()[:16]}.yaml"


envvars:
    "PATH",


# The stages are commands of the environment that runs Snakemake, activated or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


# Snakemake sets OMP_NUM_THREADS to a job's threads. numba makes a pool of its own, and those of its
# threads that are not asked to work spin: two samplers of one thread took half of each other's time.
# A prefix of one's own replaces Snakemake's, by which a job fails where its first command does.
STAGES = os.path.join(workflow.basedir, "workflow/scripts/stages.py")
FORKED = f"{quote(sys.executable)} {quote(STAGES)} run"
FORKED = FORKED.replace("{", "{{").replace("}", "}}")  # Snakemake formats the prefix
shell.prefix(
    f"set -euo pipefail; export FEWLINES_CONFIG={SETTINGS} "
    "NUMBA_NUM_THREADS=${{OMP_NUM_THREADS:-1}}; "
    'fewlines() {{ if [ -S "${{FEWLINES_STAGES:-}}" ]; '
    f'then {FORKED} "$FEWLINES_STAGES" "$@"; '
    'else command fewlines "$@"; fi; }}; '
)


# Where a job sees none of the main process's files, it writes this one itself.
if workflow.remote_exec and not os.path.exists(SETTINGS):
    write_text(Path(SETTINGS), RESOLVED)


# Jobs of this machine are forks of one process that has imported torch; those that run elsewhere, or
# in an environment of their own, are not.
onstart:
    write_text(OWNER, describe_owner())
    write_text(Path(SETTINGS), RESOLVED)
    write_text(
        Path(f"{RUN}/experiment.yaml"), RESOLVED
    )  # the last one, for its readers
    if (
        workflow.local_exec
        and not workflow.deployment_settings.deployment_method
        and hasattr(os, "pidfd_open")
    ):
        place = os.path.join(tempfile.mkdtemp(prefix="fewlines-"), "socket")
        command = [sys.executable, STAGES, "serve", place]
        workflow.stages = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not os.path.exists(place) and workflow.stages.poll() is None:
            time.sleep(0.01)
        os.environ.update(FEWLINES_STAGES=place)


# A training on several GPUs is as many processes.
LAUNCHED = (
    f"torchrun --standalone --nproc-per-node {EXPERIMENT.training.gpus} --no-python fewlines"
    if EXPERIMENT.training.gpus > 1
    else "fewlines"
)


scattergather:
    shard=EXPERIMENT.sampling.shards,
    tokens=EXPERIMENT.data.shards,


wildcard_constraints:
    cache="|".join(map(re.escape, CACHES)),
    model="|".join(map(re.escape, dict(ROWS + OTHERS))),
    architecture="|".join(map(re.escape, EXPERIMENT.architectures)) or "none",
    adapted="|".join(map(re.escape, ADAPTED)) or "none",
    searched="|".join(map(re.escape, EXPERIMENT.search.caches)) or "none",


# Of jobs that take every core: one after another, before those of one core, which then run side by
# side to the end. Taken in turns, a core would wait at each change.
ALONE = 1


def settings(stage):
    """Of a rule's `params`: all values that its stage reads, as it declares them. Their change runs
    a job again, and nothing else of the configuration does."""
    values = EXPERIMENT.model_dump(mode="json")

    def of_job(wildcards):
        read = {name: values[name] for name in READS[stage] if name in values}
        if "task" in READS[stage]:
            found = EXPERIMENT.get_task(wildcards.model)
            left = {"caches"} if stage == "measure-quality" else {"caches", "against"}
            read["task"] = found and found.model_dump(mode="json", exclude=left)
        if "searched" in READS[stage]:
            read["searched"] = {
                **EXPERIMENT.search.model_dump(include={"images", "trials"}),
                "options": EXPERIMENT.search.caches[wildcards.searched][1],
            }
        if "architecture" in READS[stage]:
            found = EXPERIMENT.get_architecture(wildcards.architecture)
            read["architecture"] = found.model_dump(mode="json")
        if "adapted" in READS[stage]:
            model = EXPERIMENT.get_adapted(wildcards.adapted)
            read["training"] = EXPERIMENT.get_training(model).model_dump(mode="json")
            read["adapted"] = model.model_dump(
                mode="json", exclude={"compared", "measure"}
            )
        return read

    return of_job


def of(rows, pattern):
    """The files of some rows, each a model and a cache."""
    return [
        f"{RUN}/{pattern.format(model=model, cache=cache)}" for model, cache in rows
    ]


def likelihoods(rows):
    scored = {(EXPERIMENT.get_scored(model), cache): None for model, cache in rows}
    return of(scored, "{model}/likelihood/{cache}.json")


# Trained where it is what images are compared by.
CLASSIFIER = (
    [f"{RUN}/classifier.safetensors"]
    if EXPERIMENT.quality.features == "classifier"
    else []
)


def find_images(wildcards):
    """All images; none where tokens stand in their place."""
    if EXPERIMENT.data.tokens:
        raise FewlinesError(
            "data.tokens stands in place of images and of the tokenizer that made it, so nothing "
            "can be decoded or judged here; ask for likelihood_table, lines_table or nothing"
        )
    return DATA


def classifier_option(wildcards, input):
    return f"--classifier {quote(str(input.classifier))}" if input.classifier else ""


def run_folder(wildcards, output):
    """Where all of the run lies: not under its own name where a storage plugin keeps it."""
    return output[0].rpartition(RUN)[0] + RUN


def weights(wildcards):
    """The weights of a row's model; tasks have the base model's."""
    return f"{RUN}/{EXPERIMENT.get_weights(wildcards.model)}/model.safetensors"


def models_of(rows):
    """The weights of some rows' models, whose headers tables read."""
    named = dict.fromkeys(EXPERIMENT.get_weights(model) for model, _ in rows)
    return [f"{RUN}/{model}/model.safetensors" for model in named]


def calibration(wildcards):
    """The calibration, for caches that go by one."""
    return calibration_for([wildcards.cache])


def calibration_for(slugs):
    """The file with all that these caches go by."""
    return calibration_needed(*(EXPERIMENT.get_cache(slug).requires for slug in slugs))


def calibration_needed(*needs):
    """The file with all of this of a calibration."""
    if "band losses" in needs:
        return [f"{RUN}/{BASE}/bands.safetensors"]
    return [f"{RUN}/{BASE}/calibration.safetensors"] if any(needs) else []


def calibration_option(wildcards, input):
    return f"--calibration {quote(str(input.calibration))}" if input.calibration else ""
