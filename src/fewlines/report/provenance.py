"""Where a run's numbers come from: commit, versions, machine, precision."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from fewlines import machine
from fewlines.config import Experiment
from fewlines.files import read_json, write_json

# What was published after an earlier run is no change of what makes the next one.
CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
CODE = Path(__file__).parent
PROVENANCE = "provenance.json"  # of a run: what was put together, no measurement


def describe_run(config: Experiment, checkout: Path) -> dict[str, Any]:
    """Describe what a reader needs to place a run, and to repeat it."""
    dtype = machine.resolve_precision(config.precision)
    precision = machine.dtype_name(dtype)
    return {"experiment": config.name, "precision": precision, **describe_machine(checkout)}


def describe_machine(checkout: Path) -> dict[str, Any]:
    """Describe the code and the machine that it runs on."""
    return {
        "commit": run_git(checkout, "rev-parse", "HEAD"),
        "modified": bool(run_git(checkout, *CHANGES)),
        **machine.describe(),
    }


def make_stamp(facts: dict[str, Any]) -> dict[str, str]:
    """Make what a number says of its origin: commit, with a `+` where the code was changed since,
    machine and versions.

    Args:
        facts: of `describe_machine`.
    """
    changed = "+" if facts["commit"] and facts["modified"] else ""
    return {
        "commit": facts["commit"][:12] + changed,
        "machine": facts["gpu"] or f"{facts['processor']}, {facts['cores']} cores",
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
    }


def make_stamp_here() -> dict[str, str]:
    """Make the stamp of what is measured now, by the code that runs: of no commit, where that was
    installed without its history."""
    facts = describe_machine(CODE)
    tracked = run_git(CODE, "ls-files", Path(__file__).name)
    return make_stamp(facts if tracked else facts | {"commit": ""})


def write_measured(path: Path, content: dict[str, Any]) -> None:
    """Write what was measured to JSON, with its stamp."""
    write_json(path, {**content, "measured": make_stamp_here()})


def collect_stamps(run: Path) -> dict[str, str]:
    """Put together what the measurements of a run say of their origin: both commits, of a run that
    went on after a change."""
    paths = [path for path in sorted(run.rglob("*.json")) if path.name != PROVENANCE]
    contents = [read_json(path) for path in paths]
    found = [each["measured"] for each in contents if isinstance(each, dict) and "measured" in each]
    keys = found[0] if found else ()
    return {key: "; ".join(sorted({each[key] for each in found} - {""})) for key in keys}


def run_git(checkout: Path, *arguments: str) -> str:
    """Ask git; gives nothing where there is no git, no repository, or no answer."""
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
