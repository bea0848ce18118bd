"""Takes away the lock of a run that was killed with all its processes, and says so.

Snakemake cannot know whether who locked a folder is still at work. A run says who it is as it
starts, and nothing is unlocked but where that process, on this very machine, is alive no more.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil

LOCKS, OWNER = Path(".snakemake/locks"), Path(".snakemake/fewlines-run.json")


def describe_owner() -> str:
    """Describe this process, for those who find its lock."""
    me = psutil.Process()
    return json.dumps({"machine": socket.gethostname(), "pid": me.pid, "started": find_start(me)})


def find_start(process: psutil.Process) -> float:
    """Find when a process started: in ticks since the machine did, where the system says them, as
    clocks may be set while it runs."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return float(fields[19])  # `starttime`, the 22nd of proc(5)
    except OSError:
        return process.create_time()


def find_dead_owner() -> int | None:
    """Find the process that locked this folder, if it is sure that it has ended."""
    locks = list(LOCKS.glob("*"))
    if not locks or not OWNER.exists():
        return None
    if OWNER.stat().st_mtime < max(lock.stat().st_mtime for lock in locks):
        return None  # of an earlier run: who locked this one did not come so far
    owner = json.loads(OWNER.read_text())
    if owner["machine"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(owner["pid"])
        alive = find_start(process) == owner["started"]
        alive &= process.status() != psutil.STATUS_ZOMBIE  # nobody has asked yet how it ended
    except psutil.NoSuchProcess:
        alive = False
    return None if alive else int(owner["pid"])


if __name__ == "__main__":
    dead = find_dead_owner()
    if dead is not None:
        print(
            f"the run of process {dead} was killed; its lock is taken away, and it goes on",
            flush=True,
        )
        command = [Path(sys.executable).with_name("snakemake"), "--unlock", "--quiet"]
        subprocess.run(command, check=True)
