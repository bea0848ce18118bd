from __future__ import annotations

import os
import subprocess
from functools import partial

import pandas as pd

from fewlines.cli import main
from fewlines.config import Experiment, validate_experiment
from fewlines.files import write_csv, write_json
from fewlines.report import provenance
from fewlines.report.provenance import collect_stamps, describe_run, write_measured
from fewlines.stages.publish import publish


def run_git(folder, *arguments) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    plain["GIT_CONFIG_GLOBAL"] = os.devnull
    done = subprocess.run(
        command, cwd=folder, env=plain, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_table_that_is_older_than_the_code_that_it_measures_is_listed(tmp_path, capsys):
    """Of what it measures: likelihood does not hang on the timing of steps."""
    git = partial(run_git, tmp_path)
    git("init")
    reference, code = tmp_path / "results/reference", tmp_path / "src/fewlines"
    reference.mkdir(parents=True)
    for name in ("bench", "cache"):
        (code / name).mkdir(parents=True)
        (code / name / "a.py").write_text("before")
    git("add", "."), git("commit", "-m", "first")
    stamp = git("rev-parse", "HEAD")[:12]
    for name, column in (("times", "seconds_per_image"), ("nats", "nll_delta"), ("other", "x")):
        (reference / f"{name}.csv").write_text(f"{column},commit\n1,published in {stamp}\n")
    (reference / "lost.csv").write_text("nll_delta,commit\n1,0123456\n")
    both = f"seconds_per_image,commit\n1,{stamp}; 0123456+\n"
    (reference / "mixed.csv").write_text(both)
    git("add", "."), git("commit", "-m", "measured")
    (code / "bench/a.py").write_text("after")
    git("add", "."), git("commit", "-m", "faster")
    assert main(["list-stale", f"--reference={reference}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "lost.csv: of a commit that this clone does not have, 0123456" in said[0]
    assert f"mixed.csv: of a commit that this clone does not have, {stamp}; 0123456+" in said[1]
    assert f"times.csv: published in {stamp}; 1 commits have changed" in said[2]


def test_a_tracked_table_is_correlated_and_says_where_it_is_from(tmp_path):
    table, output = tmp_path / "cache.csv", tmp_path / "correlations.csv"
    rows = [["base", "abcd"[n], n * 0.001, n, -n, n, n, n, "007", "here", "v"] for n in range(4)]
    names = "model policy nll_delta fid_mean kid_mean is_mean precision recall"
    names += " commit machine versions"
    pd.DataFrame(rows, columns=names.split()).to_csv(table, index=False)
    assert main(["correlate", f"--table={table}", f"--output={output}"]) == 0
    found = pd.read_csv(output, dtype={"commit": str})
    assert found["spearman"].tolist() == [1, -1, 1, 1, 1] * 3
    assert set(found["commit"]) == {"007"}


def test_a_run_is_modified_by_code_not_by_what_was_published(tmp_path):
    git = partial(run_git, tmp_path)
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


def test_a_run_that_went_on_after_a_change_names_both_commits(tmp_path, monkeypatch):
    git, run = partial(run_git, tmp_path), tmp_path / "results/mine"
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    git("init")
    (tmp_path / "provenance.py").write_text("the file that asks")
    commits = []
    for name in ("first", "second"):
        (tmp_path / "code.py").write_text(name)
        git("add", "."), git("commit", "-m", name)
        commits.append(git("rev-parse", "HEAD")[:12])
        write_measured(run / f"likelihood/{name}.json", {"nll": 1.0})
    (tmp_path / "code.py").write_text("not committed")
    write_measured(run / "quality.json", {"sets": []})
    git("rm", "-q", "--cached", "provenance.py")  # a repository that is not of this code
    write_measured(run / "cost.json", {"rows": []})
    write_csv(run / "tables/cache.csv", [{"policy": "full", "nll": 1.0}])
    experiment = validate_experiment({"name": "mine", "publish": {"mine.csv": "tables/cache.csv"}})
    expected = "; ".join(sorted({*commits, f"{commits[1]}+"}))
    for _ in range(2):  # a run without a report, and one with a report that says so already
        publish(experiment, run, tmp_path)
        assert pd.read_csv(tmp_path / "mine.csv")["commit"].tolist() == [expected]
        facts = describe_run(experiment, tmp_path) | {"measured": collect_stamps(run)}
        write_json(run / "provenance.json", facts)


def test_a_row_keeps_the_stamp_of_its_own_measurement(tmp_path):
    run = tmp_path / "run"
    write_csv(run / "tables/efficiency.csv", [{"policy": "full", "commit": "0" * 12}])
    experiment = validate_experiment({"publish": {"mine.csv": "tables/efficiency.csv"}})
    publish(experiment, run, tmp_path)
    (row,) = pd.read_csv(tmp_path / "mine.csv", dtype=str).to_dict("records")
    assert row["commit"] == "0" * 12
    assert "torch" in row["versions"]
