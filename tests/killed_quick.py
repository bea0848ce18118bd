"""`make quick` twice, undisturbed and killed at random: the same tables, measured times apart. No
test but a command, `make kills`: it takes a quarter of an hour."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from toy_chain import KILLS, REPOSITORY, make_folder, run_to_the_end, snakemake

QUICK = REPOSITORY / "experiments" / "quick.yaml"
LIMIT = 1800  # seconds that the chain may take
PAUSE = 15  # seconds between two kills, at most: stages take longer than those of toys
# Columns of times and memory, kv_bytes apart.
MEASURED = "seconds|_bytes|speedup|time_ratio|memory_ratio|memory_saving"
TABLES = ("cache", "ranks", "paper", "reference-scores", "storage")


def main() -> None:
    """Raises where a table differs."""
    with tempfile.TemporaryDirectory(prefix="fewlines-kills-") as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        make_folder(calm)
        snakemake(calm, config=QUICK, limit=LIMIT)
        run_to_the_end(killed, QUICK, PAUSE, LIMIT)
        victims = (killed / "killed").read_text().splitlines()
        stages = sorted({victim.split()[0] for victim in victims if victim != "snakemake"})
        for table in TABLES:
            one, other = (lasting(folder, table) for folder in (calm, killed))
            pd.testing.assert_frame_equal(one, other, check_exact=True, obj=table)
            print(f"{table}.csv: {len(one)} rows, {len(one.columns)} columns equal")
    whole = victims.count("snakemake")
    counts = f"{len(victims)} of {KILLS} kills, {whole} of them of Snakemake with all that it ran"
    print(f"{counts}; stages: {', '.join(stages)}")


def lasting(folder: Path, name: str) -> pd.DataFrame:
    """Of a table what is not measured time or memory."""
    table = pd.read_csv(folder / "results/quick/tables" / f"{name}.csv", dtype=str)
    measured = table.filter(regex=MEASURED).columns.difference(["kv_bytes"])
    return table.drop(columns=measured)


if __name__ == "__main__":
    main()
