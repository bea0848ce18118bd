"""Results that a repository tracks, and the numbers of its documents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd

from fewlines.config import Experiment
from fewlines.errors import FewlinesError
from fewlines.files import read_json, replacing, write_text
from fewlines.report.blocks import fill
from fewlines.report.provenance import (
    PROVENANCE,
    collect_stamps,
    describe_run,
    make_stamp,
    run_git,
)
from fewlines.report.tables import make_correlation_table


def publish(config: Experiment, run: Path, reference: Path) -> None:
    """Copy what the experiment publishes into a folder that is tracked; every row of a table says
    which commit, machine and versions it is of: its own, where the measurement kept them.

    Args:
        config: the experiment.
        run: its folder in results.
        reference: the tracked folder.
    """
    if not config.publish:
        raise FewlinesError("publish: this experiment says nothing under 'publish'")
    missing = [
        str(run / source) for source in config.publish.values() if not (run / source).exists()
    ]
    if missing:
        raise FewlinesError(f"{missing[0]} is missing; finish the run with 'snakemake' first")
    recorded = run / PROVENANCE
    facts = read_json(recorded) if recorded.exists() else describe_run(config, Path.cwd())
    measured = {key: text for key, text in collect_stamps(run).items() if text}
    stamp = make_stamp(facts) | measured
    for name, source in config.publish.items():
        path, target = run / source, reference / name.format(name=config.name)
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=dict.fromkeys(stamp, "str"))
            for key, text in stamp.items():  # of rows that do not say it themselves
                table[key] = table[key].fillna(text) if key in table else text
            write_text(target, table.to_csv(index=False, float_format="%.6g"))
        else:
            with replacing(target) as temporary:
                shutil.copyfile(path, temporary)


def correlate(table: Path, output: Path) -> None:
    """Correlate likelihood with the measures of samples in a table that is tracked already.

    Args:
        table: `cache.csv` of a run, or the tracked one.
        output: CSV to write; its rows say where the table's come from.
    """
    rows = pd.read_csv(table, dtype={"commit": str})
    found = make_correlation_table(rows)
    stamp = {name: rows[name].iloc[0] for name in ("commit", "machine", "versions") if name in rows}
    write_text(output, found.assign(**stamp).to_csv(index=False, float_format="%.6g"))


# What the numbers of a table hang on, by columns that say what was measured.
MEASURED_BY = {
    "seconds_per_image": ("attention", "bench", "decode", "models"),
    "seconds_per_step": ("attention", "bench", "decode", "models", "training"),
    "fid_mean": ("attention", "cache", "decode", "metrics", "models", "training"),
    "nll_delta": ("attention", "cache", "calibration", "metrics", "models", "training"),
}


def list_stale(reference: Path) -> None:
    """List the tracked tables that are older than the code that measured them, and how many commits
    have changed that code since.

    Args:
        reference: the tracked folder, in a clone with its history.
    """
    for path in sorted(reference.rglob("*.csv")):
        table = pd.read_csv(path, dtype={"commit": str})
        code = {each for column in MEASURED_BY if column in table for each in MEASURED_BY[column]}
        folders = [f":/src/fewlines/{each}" for each in sorted(code)]
        for stamp in table.get("commit", pd.Series(["nobody knows"])).unique() if folders else ():
            commits = re.findall(r"[0-9a-f]{7,}", str(stamp))
            counts = [
                run_git(reference, "rev-list", "--count", f"{commit}..HEAD", "--", *folders)
                for commit in commits
            ]
            if not all(counts) or not counts:
                print(f"{path}: of a commit that this clone does not have, {stamp}")
            elif oldest := max(int(count) for count in counts):
                print(f"{path}: {stamp}; {oldest} commits have changed {', '.join(sorted(code))}")


def fill_blocks(document: list[Path], reference: Path, check: bool = False) -> None:
    """Fill the marked blocks of documents from the tracked tables, see `fewlines.report.blocks`.

    Args:
        document: Markdown with blocks; may be given again.
        reference: folder of the tracked tables.
        check: change nothing, and fail where a block is stale.
    """
    for path in document:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, reference)
        if filled != text and check:
            raise FewlinesError(f"{path}: a block is stale; run 'fewlines fill-blocks'")
        if filled != text:
            write_text(path, filled)
