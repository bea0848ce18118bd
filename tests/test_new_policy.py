"""The policy of docs/adding-a-policy.md, one file and no other edit, is known everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command beside a copy of the package that has the page's policy in it."""
    page = (REPOSITORY / "docs/adding-a-policy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    copy = tmp_path_factory.mktemp("copy") / "fewlines"
    shutil.copytree(REPOSITORY / "src/fewlines", copy, ignore=shutil.ignore_patterns("*.pyc"))
    (copy / "cache/policies/odd.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_configuration_tables_and_commands_know_it(run, tmp_path):
    config = tmp_path / "odd.yaml"
    config.write_text(
        "caches: [{policy: full}, {policy: odd, budget: {lines: 3}, merge: true}]\n"
        "paper: {cache: odd+merge-3lines}\n"
    )
    found = run(
        "-c",
        "import sys; from pathlib import Path; from fewlines.config.settings import load_experiment;"
        f"experiment = load_experiment([Path({str(config)!r})]);"
        "print([cache.policy_text for cache in experiment.cache_by_slug.values()])",
    )
    assert found == "['full', 'odd+merge']\n"
    plan = run(
        "-c",
        "from fewlines.cli import main; main()",
        *["plan", "--shape", "llamagen-b", "--grid", "24", "--cache", "odd:4lines"],
    )
    assert "odd" in plan


def test_it_is_tested_for_parity_and_for_its_bound(run):
    tests = ("tests/cache/test_parity.py", "tests/cache/test_placement.py")
    found = run("-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", "odd", *tests)
    assert int(re.search(r"(\d+) passed", found)[1]) > 30
