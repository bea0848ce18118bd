from __future__ import annotations

import subprocess

from fewlines.config import Experiment
from fewlines.report.provenance import describe_run


def test_a_run_is_modified_by_code_not_by_what_was_published(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    code, published = tmp_path / "code.py", tmp_path / "results/reference/cache.csv"
    published.parent.mkdir(parents=True)
    for file in (code, published):
        file.write_text("before")
    git("add", "."), git("commit", "-m", "first")
    assert not describe_run(Experiment(), tmp_path)["modified"]
    published.write_text("after")
    assert not describe_run(Experiment(), tmp_path)["modified"]
    code.write_text("after")
    assert describe_run(Experiment(), tmp_path)["modified"]
