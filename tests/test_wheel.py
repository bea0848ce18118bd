"""The wheel holds all that is needed outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_builds_installs_and_runs_elsewhere(tmp_path):
    checkout = tmp_path / "checkout"  # building leaves files behind
    shutil.copytree(
        REPOSITORY / "src",
        checkout / "src",
        ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, checkout)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout),
        folder=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("fewlines-*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), folder=tmp_path)
    code = (
        "import fewlines, jinja2, pathlib;"
        "from fewlines.cache.policy import list_policies;"
        "pages = jinja2.Environment(loader=jinja2.PackageLoader('fewlines', 'report'));"
        "pages.get_template('page.html');"
        "print(pathlib.Path(fewlines.__file__).parent, *list_policies())"
    )
    where, *policies = run(
        sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(site)
    ).split()
    assert Path(where) == site / "fewlines"
    assert {"full", "lines", "scheduled"} <= set(policies)
    plan = ("plan", "--shape", "llamagen-b", "--grid", "64", "--batch", "32", "--device", "h200")
    command = (sys.executable, "-m", "fewlines.cli", *plan, "--cache", "streaming-4lines")
    assert "streaming" in run(*command, folder=tmp_path, PYTHONPATH=str(site))
