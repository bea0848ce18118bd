"""One progress line for every long loop: what, how far, how fast, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(what: str, total: int, unit: str, done: int = 0) -> tqdm:  # type: ignore[type-arg]
    """A bar on a terminal; in a log, a line every ten seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=unit,
        mininterval=0.2 if interactive else 10,
        dynamic_ncols=interactive,
        ascii=not interactive,
    )
