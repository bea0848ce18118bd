"""Stages without the seconds that Python takes to import torch, sixty times in a run.

One process imports and forks for every job; a job's own process only waits for its fork.

    python stages.py serve <socket>                        until standard input ends
    python stages.py run <socket> <stage> --option …       as `fewlines <stage> --option …`

A fork lives no longer than the process that waits for it, nor than the server. Where no server is,
as on another machine, `run` becomes `fewlines` itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of linux/prctl.h: a signal for when the parent ends


def run(path: str, arguments: list[str]) -> int:
    """Have a stage run by the server; returns its exit status."""
    request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    content = json.dumps(request).encode()
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        socket.send_fds(connection, [len(content).to_bytes(4, "big")], [1, 2])
        connection.sendall(content)
    except OSError:
        os.execvp("fewlines", ["fewlines", *arguments])
    status = connection.recv(1)
    return status[0] if status else 128 + signal.SIGKILL


def serve(path: str) -> None:
    """Fork for every job until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Snakemake's to answer
    server, selector = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
    server.bind(path)
    server.listen(64)
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(server, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                Path(path).unlink()
                Path(path).parent.rmdir()
                return
            if key.fileobj is server:
                connection, _ = server.accept()
                request, outputs = receive(connection)
                if request is None:  # whoever asked has ended
                    connection.close()
                    continue
                import_stage(request["arguments"][0])
                parent, process = os.getpid(), os.fork()
                if process == 0:
                    os._exit(answer(request, outputs, parent))
                for each in outputs:
                    os.close(each)
                selector.register(connection, selectors.EVENT_READ, process)
                selector.register(os.pidfd_open(process), selectors.EVENT_READ, connection)
            elif isinstance(key.data, int):  # whoever waited has ended
                if key.fileobj.fileno() >= 0:  # and was not answered a moment ago
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)
            else:  # the fork has ended
                selector.unregister(key.fd)
                with contextlib.suppress(KeyError):
                    selector.unregister(key.data)
                report(key.fd, key.data)


def report(handle: int, connection: socket.socket) -> None:
    """Say how a fork ended to whoever waits for it."""
    ended = os.waitid(os.P_PIDFD, handle, os.WEXITED)
    status = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)
    with contextlib.suppress(OSError):
        connection.sendall(bytes([status]))
    connection.close()
    os.close(handle)


def import_stage(name: str) -> None:
    """Import what a stage imports, and all that later ones share with it."""
    import fewlines.cli  # noqa: F401
    from fewlines.stages import MODULES, load_stage

    if name in MODULES:
        load_stage(name)


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive what is to run, None where that breaks off, and where its output and errors go."""
    length, outputs, _, _ = socket.recv_fds(connection, 4, 2)
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        part = connection.recv(65536)
        if not part:
            break
        content += part
    whole = len(outputs) == 2 and len(content) == int.from_bytes(length, "big")
    return (json.loads(content) if whole else None), outputs


def answer(request: dict[str, Any], outputs: list[int], parent: int) -> int:
    """Be the process of a job; returns its exit status."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which ended before that
        return 128 + signal.SIGKILL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in zip((1, 2), outputs, strict=True):
        os.dup2(descriptor, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    import numba

    from fewlines.cli import main

    numba.config.reload_config()  # the environment says how many threads it makes
    try:
        return main(request["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
