"""The process that jobs of a run are forks of: `workflow/scripts/stages.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from toy_chain import REPOSITORY

SCRIPT = REPOSITORY / "workflow/scripts/stages.py"
PLAN = ["plan", "--shape=llamagen-b", "--cache=full", "--grid=24"]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def server(tmp_path):
    """A server, and the path of its socket."""
    place = tmp_path / "server" / "socket"
    place.parent.mkdir()
    process = psutil.Popen([sys.executable, SCRIPT, "serve", place], stdin=subprocess.PIPE)
    wait(place.exists)
    yield process, place
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert not place.parent.exists()


def wait(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.02)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stop_at_work(fork: psutil.Process) -> None:
    """Stop a fork in the middle of a stage, so that it cannot end by itself."""
    wait(lambda: fork.cpu_times().user > 0.3)
    fork.suspend()


def start(place: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "run", place, *arguments]
    environment = {**os.environ, "PATH": PATH}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_a_stage_prints_and_ends_as_by_itself(server):
    _, place = server
    done = start(place, *PLAN, "--device=h200")
    printed, _ = done.communicate(timeout=300)
    assert done.returncode == 0
    assert "24×24 tokens, 1 images" in printed
    wrong = start(place, *PLAN, "--device=abacus")
    _, said = wrong.communicate(timeout=300)
    assert wrong.returncode == 2
    assert "unknown device 'abacus'" in said


def test_a_fork_dies_with_whoever_waits_for_it_and_with_the_server(server):
    process, place = server
    start(place, *PLAN, "--device=h200").communicate(timeout=300)  # imports may ask other programs
    assert not process.children()
    waiting = start(place, *PLAN, "--device=this")  # it measures this machine for seconds
    wait(process.children)
    (fork,) = process.children()
    stop_at_work(fork)
    waiting.kill()
    waiting.communicate()
    wait(lambda: has_ended(fork))
    waiting = start(place, *PLAN, "--device=this")
    wait(lambda: [each for each in process.children() if each.pid != fork.pid])
    fork = process.children()[-1]
    stop_at_work(fork)
    process.stdin.close()
    waiting.communicate(timeout=60)
    assert waiting.returncode == 137
    wait(lambda: has_ended(fork))


def test_without_a_server_it_is_fewlines_itself(tmp_path):
    done = start(tmp_path / "nowhere", *PLAN, "--device=h200")
    printed, _ = done.communicate(timeout=300)
    assert done.returncode == 0
    assert "24×24 tokens, 1 images" in printed
