"""`make quick` twice, undisturbed and killed at random: the same tables, measured times apart. No
test but a command: it takes a quarter of an hour."""

from __future__ import annotations

import tempfile
from pathlib import Path

from toy_chain import KILLS, QUICK, compare_tables, make_folder, run_to_the_end, snakemake

LIMIT = 1800  # seconds that the chain may take
PAUSE = 15  # seconds between two kills, at most: stages take longer than those of toys


def main() -> None:
    """Raises where a table differs."""
    with tempfile.TemporaryDirectory(prefix="fewlines-kills-") as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        make_folder(calm)
        snakemake(calm, config=QUICK, limit=LIMIT)
        run_to_the_end(killed, QUICK, PAUSE, LIMIT)
        victims = (killed / "killed").read_text().splitlines()
        stages = sorted({victim.split()[0] for victim in victims if victim != "snakemake"})
        compare_tables(calm, killed)
    whole = victims.count("snakemake")
    counts = f"{len(victims)} of {KILLS} kills, {whole} of them of Snakemake with all that it ran"
    print(f"{counts}; stages: {', '.join(stages)}")


if __name__ == "__main__":
    main()
