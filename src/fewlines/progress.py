"""One progress line for every long loop: what, how far, how fast, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm


class _LogLines:
    """Standard error for logs: every state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(what: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> tqdm:  # type: ignore[type-arg]
    """A bar on a terminal; in a log, a line every ten seconds; nothing where it is not `shown`."""
    interactive = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=f" {unit}",
        disable=not shown,
        mininterval=0.2 if interactive else 10,
        dynamic_ncols=interactive,
        ascii=not interactive,
        file=sys.stderr if interactive else _LogLines(),
        bar_format=None
        if interactive
        else "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}",
    )
