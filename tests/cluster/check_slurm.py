"""The quick experiment on a Slurm of three nodes: a job is killed, a node is lost, and its tables
are those of a local run, measured times apart. No test but a command, `make test-cluster`: as root,
on Debian, it takes half an hour."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from toy_chain import QUICK, SNAKEMAKE, compare_tables, make_folder, snakemake  # noqa: E402

SLURM = Path(__file__).parent / "slurm.sh"
LIMIT = 2400  # seconds that a chain may take
HERE = [  # what is of this Slurm, and would stand in a profile of one's own
    *("--slurm-no-account", "--slurm-status-command=squeue"),
    *("--slurm-init-seconds-before-status-checks=2", "--latency-wait=10"),
    *("--default-resources", "mem_mb=1500*attempt", "runtime=20*attempt"),
]


def main() -> None:
    """Raises where a table differs, or a run does not end."""
    with tempfile.TemporaryDirectory(prefix="fewlines-cluster-") as name:
        local, cluster, state = (Path(name) / each for each in ("local", "cluster", "slurm"))
        state.mkdir()
        run(SLURM, "start", state)
        try:
            make_folder(local)
            took = timed(lambda: snakemake(local, "--cores=2", config=QUICK, limit=LIMIT))
            print(f"local run: {took:.0f} s", flush=True)
            make_folder(cluster)
            took = timed(lambda: run_on_cluster(cluster, state))
            print(f"on three nodes, of which one was lost: {took:.0f} s")
            compare_tables(local, cluster)
        finally:
            run(SLURM, "stop", state)


def run_on_cluster(folder: Path, state: Path) -> None:
    """Run the experiment; kill its first job that draws, then lose the node of another."""
    command = [*SNAKEMAKE, "--workflow-profile=profiles/slurm", f"--configfile={QUICK}", *HERE]
    with (folder / "snakemake.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        deadline = time.monotonic() + LIMIT
        killed = lost = ""
        nodes: dict[str, str] = {}
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise TimeoutError((folder / "snakemake.log").read_text())
            time.sleep(1)
            running = list_running()
            nodes |= {job: node for job, (node, _) in running.items()}
            drawing = [job for job, (_, rule) in running.items() if "generate" in rule]
            if drawing and not killed:
                killed = drawing[0]
                run("scancel", killed)
            elif killed and not lost:
                lost = next((running[job][0] for job in drawing if job != killed), "")
                if lost:
                    run(SLURM, "lose", state, lost)
    said = (folder / "snakemake.log").read_text()
    assert process.returncode == 0, said
    assert killed, "no job was killed"
    assert lost, "no node was lost"
    of_node = {node: list(nodes.values()).count(node) for node in sorted({*nodes.values()})}
    print(f"job {killed} was killed, node {lost} lost; jobs seen on each: {of_node}")


def list_running() -> dict[str, tuple[str, str]]:
    """Jobs that run: their node, and the rule in their comment."""
    lines = run("squeue", "--noheader", "--states=R", "--format=%i|%N|%k").splitlines()
    return {job: (node, rule) for job, node, rule in (line.split("|", 2) for line in lines)}


def run(*command: str | Path) -> str:
    """Run a command; returns what it printed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work took."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
