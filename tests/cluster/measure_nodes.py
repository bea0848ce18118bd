"""What a second and a third node save, of drawing and of encoding: six jobs of one thread each, a
node for one job at a time, on a Slurm of three nodes on this machine. No test but a command, of
twenty minutes: its figures go into the file that it is told."""

from __future__ import annotations

import sys
import tempfile
from datetime import datetime
from pathlib import Path

import pandas as pd
from check_slurm import HERE, LIMIT, REPOSITORY, SLURM, run

from fewlines.files import write_text
from fewlines.report.provenance import make_stamp_here
from toy_chain import make_folder, snakemake

EXPERIMENT = REPOSITORY / "tests/cluster/nodes.yaml"
NODES, REPEATS, JOBS = ("n1", "n2", "n3"), 2, 6  # as many as shards in the experiment
TARGETS = {
    "generate": "results/nodes/base/samples/full.safetensors",
    "tokenize": "results/nodes/tokens.safetensors",  # the last: models are of it
}
ON_SLURM = [*HERE, "slurm_extra='--exclusive'"]  # among the default resources


def main(output: Path) -> None:
    """Writes a row for each stage and number of nodes."""
    with tempfile.TemporaryDirectory(prefix="fewlines-nodes-") as name:
        folder, state = Path(name) / "run", Path(name) / "slurm"
        state.mkdir()
        make_folder(folder)
        snakemake(folder, "--cores=2", TARGETS["generate"], config=EXPERIMENT, limit=LIMIT)
        run(SLURM, "start", state)
        try:
            taken = [
                {"stage": stage, "nodes": nodes, "seconds": measure(folder, stage, nodes)}
                for stage in TARGETS
                for _ in range(REPEATS)
                for nodes in range(1, len(NODES) + 1)
            ]
        finally:
            run(SLURM, "stop", state)
    rows = pd.DataFrame(taken).groupby(["stage", "nodes"], sort=False)["seconds"]
    table = rows.agg(seconds="mean", seconds_low="min", seconds_high="max").reset_index()
    alone = table.groupby("stage")["seconds"].transform("first")
    table = table.assign(speedup=alone / table["seconds"], repeats=REPEATS, **make_stamp_here())
    write_text(output, table.to_csv(index=False))


def measure(folder: Path, stage: str, nodes: int) -> float:
    """Run a stage's jobs on so many nodes. Returns seconds from the first's start to the last's
    end, as Slurm tells them: how often Snakemake asks is not in it."""
    spare = NODES[nodes:]
    for node in spare:
        run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=measured")
    before = list_times()
    command = ["--workflow-profile=profiles/slurm", f"--forcerun={stage}", *ON_SLURM]
    snakemake(folder, TARGETS[stage], *command, config=EXPERIMENT, limit=LIMIT)
    since = {job: times for job, times in list_times().items() if job not in before}
    jobs = [times for times in since.values() if times[0].startswith(f"rule_{stage}_")]
    assert len(jobs) == JOBS, since
    starts, ends = ([datetime.fromisoformat(times[each]) for _, *times in jobs] for each in (0, 1))
    for node in spare:
        run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    seconds = (max(ends) - min(starts)).total_seconds()
    print(f"{stage}: {len(jobs)} jobs, {nodes} of {len(NODES)} nodes, {seconds:.0f} s", flush=True)
    return seconds


def list_times() -> dict[str, list[str]]:
    """The rule of each job that Slurm remembers, its start and its end."""
    lines = run("squeue", "--noheader", "--states=all", "--format=%i|%k|%S|%e").splitlines()
    return {job: rest for job, *rest in (line.split("|") for line in lines)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
