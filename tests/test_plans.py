"""What Snakemake plans when a setting changes, and what a second Snakemake does to a first."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fewlines.config import Experiment, validate_experiment
from fewlines.stages import READS
from toy_chain import REPOSITORY, SNAKEMAKE, TOY, plan

# A change in every section that a plan can tell.
CHANGES = {
    "seed": 1,
    "precision": "bfloat16",
    "storage": "float16",
    "training.accumulate": 2,
    "tokenizer.steps": 61,
    "classifier.steps": 61,
    "model.steps": 31,
    "calibration.curve_images": 3,
    "adaptation.steps": 13,
    "architectures.pixelcnn.steps": 13,
    "sampling.guidance": 2.0,
    "tasks.guided": {"guidance": 2.0, "caches": ["full"]},
    "quality.kid_subsets": 6,
    "likelihood.images": 51,
    "cost.repeats": 2,
    "paper.repeats": 2,
    "efficiency.repeats": 2,
    "search.images": 7,
    "training_cost.repeats": 2,
    "publish.x": "report.html",
    "caches": [
        *yaml.safe_load(TOY.read_text())["caches"],
        {"policy": "tova", "budget": {"lines": 1}},
    ],
    "checkpoint_seconds": 5,
}
ELSEWHERE = {"name", "data", "grids"}  # they change where files lie


def change(key: str, value: object) -> dict:
    """The toy experiment with one key changed."""
    content = yaml.safe_load(TOY.read_text())
    *sections, last = key.split(".")
    inside = content
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[last] = value
    return content


def find_jobs(output: str) -> dict[str, str]:
    """What Snakemake printed of each rule."""
    blocks = re.split(r"^\[.*\]\n(?:local)?rule (\w+):$", output, flags=re.MULTILINE)[1:]
    return dict(zip(blocks[::2], blocks[1::2], strict=True))


def test_every_section_is_changed_once():
    assert {key.split(".")[0] for key in CHANGES} == set(Experiment.model_fields) - ELSEWHERE


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_changes_its_section_alone(key):
    """What stages read is declared by sections: no key is outside them."""
    before, after = (
        validate_experiment(content).model_dump(mode="json")
        for content in (yaml.safe_load(TOY.read_text()), change(key, CHANGES[key]))
    )
    assert [name for name in before if before[name] != after[name]] == [key.split(".")[0]]


def test_a_change_plans_the_stages_that_declare_to_read_it_and_no_others(folder, tmp_path):
    everything = find_jobs(plan(folder, "-n", "--forceall"))
    stage_of = {
        rule: re.search(r"fewlines ([\w-]+)", text)[1]
        for rule, text in everything.items()
        if "fewlines " in text
    }
    for key, value in CHANGES.items():
        config = tmp_path / "changed.yaml"
        config.write_text(yaml.safe_dump(change(key, value), sort_keys=False))
        jobs = find_jobs(plan(folder, "-n", config=config))
        changed = {rule for rule, text in jobs.items() if "Params have changed" in text}
        section = key.split(".")[0]
        names = {section} | ({"adapted"} if section in ("adaptation", "model") else set())
        names |= {"architecture"} if section == "architectures" else set()
        expected = {rule for rule, stage in stage_of.items() if names & set(READS[stage])}
        # Snakemake does not look for a reason of its own where a job's input is made anew.
        assert changed <= expected <= set(jobs), key
        assert bool(changed) == bool(expected), key


READ_ONLY = (
    ["-n"], ["-np"], ["--summary"], ["--detailed-summary"], ["--dag"], ["--rulegraph"],
    ["--list-rules"], ["--lint"],
)  # fmt: skip


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of the results, and when it was written."""
    files = [path for path in (folder / "results").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_second_snakemake_changes_nothing(own_folder, tmp_path):
    """Whatever it is asked to show, with another configuration of the same name; and one that
    would run is refused while the first holds the lock."""
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(change("sampling.guidance", 2.0), sort_keys=False))
    before = state(own_folder)
    for arguments in READ_ONLY:
        plan(own_folder, *arguments, config=config)
    locks = own_folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    held = "\n".join(str(path.relative_to(own_folder)) for path in before)
    (locks / "0.output.lock").write_text(held)
    assert "LockException" in plan(own_folder, config=config, status=1)
    assert state(own_folder) == before


def test_a_second_snakemake_changes_nothing_in_one_that_is_running(run, own_folder, tmp_path):
    """The other configuration would draw other images at each of the steps still to run."""
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(change("sampling.temperature", 2.0), sort_keys=False))
    for part in ("base/samples", "base/quality", "tables", "figures"):
        shutil.rmtree(own_folder / "results/toy" / part)
    command = [*SNAKEMAKE, "--configfile", str(TOY)]
    log = tmp_path / "log"  # no pipe, which nobody would empty
    with log.open("w") as output:
        running = subprocess.Popen(command, cwd=own_folder, stdout=output, stderr=output)
    asked, locks = 0, own_folder / ".snakemake/locks"
    while running.poll() is None:
        if locks.exists() and any(locks.iterdir()):
            # One that looks at a file as the other replaces it ends with an error.
            plan(own_folder, *READ_ONLY[asked % len(READ_ONLY)], config=config, status=None)
            asked += 1
        time.sleep(0.01)
    assert running.returncode == 0, log.read_text()
    assert asked
    written = yaml.safe_load((own_folder / "results/toy/experiment.yaml").read_text())
    assert written["sampling"]["temperature"] == 0.9
    for name in ("base/samples/full.safetensors", "base/quality/full.json"):
        again = own_folder / "results/toy" / name
        assert again.read_bytes() == (run / name).read_bytes(), name


UNLOCK = REPOSITORY / "workflow/scripts/unlock.py"


def test_the_lock_of_a_killed_run_is_taken_away_and_no_other(tmp_path):
    """As `make reproduce` does before anything else."""
    (tmp_path / "Snakefile").write_text("rule all:\n    output: 'done'\n    shell: 'touch done'\n")
    folder = tmp_path / ".snakemake"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    who = f"import sys; sys.path.insert(0, {str(UNLOCK.parent)!r}); import psutil, unlock, json;"
    who += f"print(json.dumps({{**json.loads(unlock.describe_owner()), 'pid': {sleeper.pid}, "
    who += f"'started': unlock.find_start(psutil.Process({sleeper.pid}))}}))"
    owner = subprocess.run([sys.executable, "-c", who], capture_output=True, text=True, check=True)
    (folder / "locks").mkdir(parents=True)
    lock, record = folder / "locks/0.output.lock", folder / "fewlines-run.json"
    lock.write_text("done")

    def unlock() -> str:
        done = subprocess.run(
            [sys.executable, UNLOCK], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert unlock() == ""  # nobody says whose it is
    record.write_text(owner.stdout)
    assert unlock() == ""  # at work
    sleeper.kill()  # a zombie from now on
    record.write_text(json.dumps({**json.loads(owner.stdout), "machine": "elsewhere"}))
    assert unlock() == ""
    assert lock.exists()
    record.write_text(owner.stdout)
    assert f"the run of process {sleeper.pid} was killed" in unlock()
    assert not lock.exists()
    sleeper.wait()
