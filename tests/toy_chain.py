"""A whole experiment, run from images to report while its processes are killed at random."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import psutil

REPOSITORY = Path(__file__).parent.parent
TOY = Path(__file__).parent / "toy.yaml"
QUICK = REPOSITORY / "experiments" / "quick.yaml"
BIN = Path(sys.executable).parent
SNAKEMAKE = [str(BIN / "snakemake"), "--max-threads", "1"]  # toys are no faster on more
KILLS, OF_ALL = 20, (4, 13)  # which of them take Snakemake with everything below it

# Columns of times and memory, and what is said of them, kv_bytes apart.
MEASURED = "seconds|_bytes|speedup|time_ratio|memory_ratio|memory_saving|time_claim|memory_claim"
TABLES = ("cache", "ranks", "paper", "reference-scores", "storage")


def snakemake(folder: Path, *arguments: str, config: Path = TOY, limit: float = 1800) -> str:
    """Run Snakemake in a folder that sees the repository's workflow; returns what it printed."""
    command = [*SNAKEMAKE, *arguments, "--configfile", str(config)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def plan(folder: Path, *arguments: str, config: Path = TOY, status: int | None = 0) -> str:
    """As `snakemake`, of what runs no job: in a fork of this process, which has imported all that
    it needs. It has to end with `status`; None is any."""
    import snakemake.cli  # noqa: F401 - before the fork, and not where no plan is made

    command = [*SNAKEMAKE[1:], *arguments, "--configfile", str(config)]
    with tempfile.TemporaryFile("w+", buffering=1) as output:
        process = os.fork()
        if process == 0:
            os._exit(be_snakemake(command, folder, output))
        ended = wait_for(process, seconds=600)
        output.seek(0)
        printed = output.read()
    assert status in (None, os.waitstatus_to_exitcode(ended)), printed
    return printed


def wait_for(fork: int, seconds: float) -> int:
    """Wait for a fork, and kill one that hangs; returns how it ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, ended = os.waitpid(fork, os.WNOHANG)
        if found:
            return ended
        time.sleep(0.005)
    os.kill(fork, signal.SIGKILL)
    return os.waitpid(fork, 0)[1]


def be_snakemake(command: list[str], folder: Path, output: TextIO) -> int:
    """Of a fork: its exit status."""
    from snakemake.cli import main

    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    os.chdir(folder)
    try:
        main(command)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
    return 99


def make_folder(folder: Path, config: str | None = None) -> None:
    """One that sees the repository's workflow and has results of its own; `config` stands in place
    of config.yaml."""
    folder.mkdir()
    for name in ("Snakefile", "workflow", "profiles", "config.yaml"):
        (folder / name).symlink_to(REPOSITORY / name)
    if config is not None:
        (folder / "config.yaml").unlink()
        (folder / "config.yaml").write_text(config)


def find_times(folder: Path) -> dict[Path, int]:
    """When each file of the results and each lock was written."""
    files = [*(folder / "results").rglob("*"), *(folder / ".snakemake/locks").glob("*")]
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def run_to_the_end(folder: Path, config: Path = TOY, pause: float = 2, limit: float = 1800) -> None:
    """Make the folder, and everything in it; `killed` lists the commands of the victims.

    Args:
        pause: seconds between two kills, at most.
        limit: seconds that Snakemake may take.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed before
    make_folder(folder)
    random = np.random.default_rng(0)
    killed: list[str] = []
    while len(killed) < KILLS:
        run_under_fire(folder, random, killed, config, pause, limit)
        if killed[-1] == "snakemake":
            snakemake(folder, "--unlock", config=config)
    (folder / "killed").write_text("\n".join(killed))


def run_under_fire(
    folder: Path,
    random: np.random.Generator,
    killed: list[str],
    config: Path,
    pause: float,
    limit: float,
) -> None:
    """Run Snakemake until it ends or is killed; `killed` grows by the commands of the victims. No
    stage is killed twice: it is tried again once."""
    command = [*SNAKEMAKE, "--configfile", str(config)]
    with (folder / "under-fire.log").open("w") as log:
        own = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = psutil.Popen(command, cwd=folder, **own)
    deadline = time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError("Snakemake did not end")
        time.sleep(random.uniform(0, pause))
        below = process.children(recursive=True) if len(killed) < KILLS else []
        stages = {stage_of(child): child for child in below}
        stages.pop("", None)
        fresh = sorted(set(stages) - set(killed))
        if not fresh:
            continue
        whole = len(killed) in OF_ALL
        chosen = fresh[random.integers(len(fresh))]
        killed.append("snakemake" if whole else chosen)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if whole:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()  # else its end may be taken for one of a later kill
            else:
                stages[chosen].kill()
    if killed[-1] != "snakemake":
        printed = (folder / "under-fire.log").read_text()[-20_000:]
        assert process.wait() == 0, f"killed: {killed}\n{printed}"
        assert len(killed) == KILLS, f"the end came before the last kill\n{printed}"


def stage_of(process: psutil.Process) -> str:
    """The command of a stage; empty of other processes, and where it has ended."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        if len(command) > 3 and command[1].endswith("stages.py") and command[2] == "run":
            return " ".join(command[4:])
    return ""


def compare_tables(one: Path, other: Path, run: str = "quick") -> None:
    """Raises where a table of two runs of an experiment differs, measured times apart."""
    for table in TABLES:
        ours, theirs = (lasting(folder / "results" / run, table) for folder in (one, other))
        if table == "storage":
            # Differences of 1e-5 nats in float32: of one command, too, the last bit is not always
            # the same.
            ours, theirs = (each.apply(pd.to_numeric, errors="coerce") for each in (ours, theirs))
            pd.testing.assert_frame_equal(ours, theirs, rtol=0, atol=1e-6, obj=table)
        else:
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=table)
        print(f"{table}.csv: {len(ours)} rows, {len(ours.columns)} columns equal")


def lasting(run: Path, name: str) -> pd.DataFrame:
    """Of a table of a run what is not measured time or memory."""
    table = pd.read_csv(run / "tables" / f"{name}.csv", dtype=str)
    measured = table.filter(regex=MEASURED).columns.difference(["kv_bytes"])
    return table.drop(columns=measured)
