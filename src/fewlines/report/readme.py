"""Numbers in documents: a block between two marks, written from the tracked reference runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fewlines.errors import FewlinesError
from fewlines.files import read_json, write_text
from fewlines.report.engine import gpu_gain
from fewlines.report.provenance import origin
from fewlines.report.readable import readable_table
from fewlines.report.seeds import seed_claim
from fewlines.report.tables import whole_images

START = "<!-- numbers: written by the commands from results/reference, not by hand -->"
END = "<!-- end of numbers -->"

PAPER_COLUMNS = (
    "source", "shape", "grid", "batch", "cache", "process MB", "decode peak MB", "KV MB",
    "ms/image", "FID", "× memory (process)", "× memory (decode peak)", "× time", "FID ratio",
)  # fmt: skip
CACHE_COLUMNS = (
    "model", "policy", "budget", "capacity", "ΔNLL (95%)", "ΔNLL to base+steps", "FID",
    "KV MB", "× memory", "× time vs lean", "× time vs stock",
)  # fmt: skip


def numbers(reference: Path) -> str:
    """The block, from the tables of the reference runs and `provenance.json`."""
    paper, cache, floors = (
        pd.read_csv(reference / f"{name}.csv") for name in ("paper", "cache", "floors")
    )
    facts = read_json(reference / "provenance.json")
    engine = pd.read_csv(reference / "efficiency.csv").iloc[0]
    drawn = cache.dropna(subset="fid_mean")
    alike = whole_images(drawn)
    rank = alike["nll"].corr(alike["fid_mean"], method="spearman")
    floor = floors.set_index("floor")["fid_mean"]
    shown = _headlines(alike)
    samples, seeds = int(drawn["samples"].iloc[0]), int(drawn["seeds"].iloc[0])
    return "\n\n".join(
        [
            "**The paper's table, re-measured** (memory and time as full ÷ few lines, FID as few "
            "lines ÷ full; the paper's rows are its own; published shapes have random weights, so "
            "no FID, and keep keys and values in 16 bits where they are lean):",
            _markdown(paper, PAPER_COLUMNS),
            *_on_gpu(reference / "gpu.csv"),
            "**The full cache against a few lines** "
            f"({seeds} seeds of {samples:,} images; ΔNLL in nats/token against `full`, paired, on "
            f"{int(cache['likelihood_images'].iloc[0])} held-out images; times at batch "
            f"{int(shown['cost_batch'].iloc[0])}; of models trained further, those by the best of "
            "the losses compared in [docs/adapting.md](docs/adapting.md)):",
            _markdown(shown, CACHE_COLUMNS),
            f"Over the {len(alike)} models and caches that images were drawn under (all of them: "
            "[docs/policies.md](docs/policies.md)) likelihood and FID rank alike: Spearman's ρ is "
            f"{rank:.2f}.",
            *seed_claim(reference),
            "FID is measured in the features of a classifier trained on the same images and "
            "compares with nothing outside this table. On as many real images it is "
            f"{floor['real']:.2f}, on the tokenizer's reconstructions "
            f"{floor['reconstruction']:.2f}.",
            f"{origin(facts)} The published shapes "
            f"were measured by `make bench` on {engine['processor']} ({engine['instructions']}) "
            f"with {engine['cores']} cores, torch {engine['torch']}.",
        ]
    )


def _headlines(table: pd.DataFrame) -> pd.DataFrame:
    """Rows whose time was taken; of models trained further, those taught the most by the base."""
    timed = table.dropna(subset="seconds_per_image")
    if "distil" not in timed:
        return timed
    most = timed["distil"].max()
    best: pd.DataFrame = timed[timed["distil"].isna() | (timed["distil"] == most)]
    return best


def _on_gpu(path: Path) -> list[str]:
    """Nothing where `make gpu` has not run."""
    return (
        [f"{gpu_gain(pd.read_csv(path))} ([docs/engine.md](docs/engine.md))"]
        if path.exists()
        else []
    )


def _markdown(table: pd.DataFrame, columns: tuple[str, ...]) -> str:
    readable = readable_table(table)
    return readable[[name for name in columns if name in readable]].to_markdown(index=False)


def put_block(document: Path, text: str) -> None:
    """Replace what stands between the marks of a document."""
    content = document.read_text(encoding="utf-8")
    if START not in content or END not in content:
        raise FewlinesError(
            f"{document} has no block for numbers; it needs the lines {START} … {END}"
        )
    before, rest = content.split(START, 1)
    _, after = rest.split(END, 1)
    write_text(document, f"{before}{START}\n\n{text}\n\n{END}{after}")
