"""Measurements in processes of their own: peaks are their own, and one that runs out of memory
takes nobody with it. Running out of memory is a result, not a failure."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fewlines.errors import FewlinesError

OK, OUT_OF_MEMORY, TIME_LIMIT = "ok", "out of memory", "time limit"


class Worker:
    """A process that builds something once and then answers questions about it."""

    def __init__(self, name: str, build: Callable[..., Any], *arguments: Any) -> None:
        """Start the process.

        Args:
            name: of what is measured, for messages.
            build: makes what is asked, in the process; its methods are the questions.
            arguments: of `build`.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([build.__module__])  # a process starts in no time
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: str, *arguments: Any, limit: float | None = None) -> Any:
        """Ask a question.

        Args:
            question: the name of a method of what was built.
            arguments: of the method.
            limit: seconds to wait; None waits for ever.

        Returns:
            What the method returned, or `OUT_OF_MEMORY` or `TIME_LIMIT`.

        Raises:
            FewlinesError: the process ended without an answer.
        """
        try:
            self.pipe.send((question, arguments))
            return self.pipe.recv() if self.pipe.poll(limit) else TIME_LIMIT
        except (EOFError, ConnectionError):
            self.process.join()
            if self.process.exitcode == -9:  # the kernel killed it
                return OUT_OF_MEMORY
            raise FewlinesError(
                f"the process that measures {self.name} ended with status {self.process.exitcode}"
            ) from None

    def close(self) -> None:
        """End the process."""
        self.pipe.close()  # it ends when nobody asks any more; killed, it would leave semaphores
        self.process.join(timeout=10)
        self.process.kill()
        self.process.join()


def _answer(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():  # the first to go, should the machine's memory run out
        adjustment.write_text("1000")
    subject = _try(build, *arguments)
    while True:
        try:
            question, given = pipe.recv()
        except EOFError:
            return
        out = isinstance(subject, str)
        pipe.send(subject if out else _try(getattr(subject, question), *given))


def _try(work: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or `OUT_OF_MEMORY`."""
    try:
        return work(*arguments)
    except (MemoryError, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # as torch says it on the CPU
            raise
        return OUT_OF_MEMORY
