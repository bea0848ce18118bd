"""The policy of docs/adding-a-policy.md, one file and no other edit, is known everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from toy_chain import TOY, snakemake

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The page's policy as a package of its own, which names it by an entry point."""
    page = (REPOSITORY / "docs/adding-a-policy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    site = tmp_path_factory.mktemp("site")
    (site / "odd.py").write_text(code)
    record = site / "odd-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 0\n")
    (record / "entry_points.txt").write_text("[fewlines.cache.policies]\nodd = odd:Odd\n")
    return site


def run(package: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_line_puts_it_into_every_table_figure_and_ranking(
    package, own_folder, tmp_path, monkeypatch
):
    experiment = yaml.safe_load(TOY.read_text())
    experiment["caches"].append({"policy": "odd", "budget": {"lines": 2}})
    config = tmp_path / "odd.yaml"
    config.write_text(yaml.safe_dump(experiment))
    monkeypatch.setenv("PYTHONPATH", str(package))
    snakemake(own_folder, config=config)
    results = own_folder / "results/toy"
    for name in ("cache", "ranks"):
        assert "odd" in set(pd.read_csv(results / f"tables/{name}.csv")["policy"]), name
    for name in ("curves", "quality"):
        assert "odd" in set(pd.read_csv(results / f"figures/{name}.csv")["series"]), name
    assert "odd-2lines" in set(pd.read_csv(results / "figures/samples.csv")["cache"])
    assert "odd-2lines" in pd.read_csv(results / "figures/lines.csv").columns
    assert re.search("<td>odd</td>", (results / "report.html").read_text())


def test_a_file_in_the_package_is_known_as_well(tmp_path):
    page = (REPOSITORY / "docs/adding-a-policy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    copy = tmp_path / "fewlines"
    shutil.copytree(REPOSITORY / "src/fewlines", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "cache/policies/odd.py").write_text(code)
    plan = ["plan", "--shape", "llamagen-b", "--grid", "24", "--cache", "odd-4lines"]
    assert "odd" in run(tmp_path, "-m", "fewlines.cli", *plan, "--device", "h200")


def test_it_is_tested_for_parity_and_for_its_bound(package):
    tests = ("tests/attention/test_parity.py", "tests/cache/test_plan.py")
    found = run(package, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", "odd", *tests)
    assert int(re.search(r"(\d+) passed", found)[1]) > 15
