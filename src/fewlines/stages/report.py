"""Tables, figures and the report of a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from fewlines.config import BASE, Experiment
from fewlines.errors import FewlinesError
from fewlines.files import replacing, write_json, write_text
from fewlines.models.checkpoint import load_network
from fewlines.models.shapes import SHAPES
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.adapting import adapting_numbers
from fewlines.report.claim import claim
from fewlines.report.config_page import describe_config
from fewlines.report.engine import engine_numbers
from fewlines.report.figures import (
    draw_budgets,
    draw_lines,
    draw_memory,
    draw_quality,
    draw_samples,
)
from fewlines.report.heads import draw_heads
from fewlines.report.page import CAPTIONS, write_page
from fewlines.report.paper import large_grids, paper_table
from fewlines.report.policies import (
    certainty,
    draw_ablations,
    draw_agreement,
    draw_policies,
    policy_numbers,
)
from fewlines.report.provenance import provenance as describe_run
from fewlines.report.readable import readable_table, write_table
from fewlines.report.readme import numbers, put_block
from fewlines.report.results import Results
from fewlines.report.tables import (
    cache_table,
    floor_table,
    network_table,
    rank_table,
    storage_table,
)
from fewlines.report.tables import likelihood_table as likelihoods
from fewlines.report.tables import quality_table as qualities

CURVE = "tables/calibration.csv"  # how few images a schedule needs; `make policies` asks
PAPER_SHAPE, PAPER_GRIDS, PAPER_BATCH = "llamagen-b", ("64x64", "96x96"), 32


def tables(config: Experiment, run: Path) -> None:
    """Write the tables of a run's folder as CSV, Markdown and LaTeX."""
    results, output = Results(config, run), run / "tables"
    write_table(cache_table(results), output, "cache")
    write_table(paper_table(results), output, "paper")
    write_table(floor_table(results), output, "floors")
    write_table(storage_table(results), output, "storage")
    write_table(rank_table(results), output, "ranks")


def likelihood_table(config: Experiment, run: Path) -> None:
    """Write the table of likelihoods alone, of all caches of the experiment."""
    results = Results(config, run)
    write_table(likelihoods(results), run / "tables", "likelihood")


def quality_table(config: Experiment, run: Path) -> None:
    """Write the table of all rows that have samples, without times."""
    write_table(qualities(Results(config, run)), run / "tables", "quality")


def figures(config: Experiment, run: Path) -> None:
    """Draw the figures of a run's folder."""
    results, output = Results(config, run), run / "figures"
    tokenizer = load_network(run / "tokenizer.safetensors", Tokenizer)
    table = cache_table(results)
    draw_quality(table, floor_table(results), output / "quality.png")
    draw_samples(results, tokenizer, output / "samples.png")
    draw_memory(results, output / "memory.png")
    draw_lines(results, output / "lines.png")
    if results.scheduled:
        placement = results.cache(results.scheduled[0]).place(results.geometry)
        draw_heads(results.calibration, placement, output / "heads.png")
    draw_budgets(table, output / "budgets.png")


def report(config: Experiment, run: Path, output: Path, provenance: Path) -> None:
    """Write the report, one HTML file, and where its numbers come from."""
    results = Results(config, run)
    facts = describe_run(config, Path.cwd())
    write_json(provenance, facts)
    table, paper, ranks = cache_table(results), paper_table(results), rank_table(results)
    limited = table[(table["model"] == BASE) & (table["policy"] != "full")]
    words = [sentence.replace("**", "") for sentence in certainty(limited, ranks)]
    readable = {
        "headlines": readable_table(table.dropna(subset="seconds_per_image")),
        "cache": readable_table(table),
        "paper": readable_table(paper),
        "ranks": readable_table(ranks),
        "floors": readable_table(floor_table(results)),
        "storage": readable_table(storage_table(results)),
        "networks": network_table(results),
    }
    pictures = {name: run / f"figures/{name}.png" for name in CAPTIONS}
    shown = {name: path for name, path in pictures.items() if path.exists()}
    write_page(output, claim(results, table, paper), readable, words, shown, facts)


def publish(run: Path, reference: Path, readme: Path, documents: Path) -> None:
    """Make a finished run the tracked one, and write the numbers of the README and of the pages in
    `documents` from it."""
    records = ("provenance", "tokenizer", "classifier", f"{BASE}/model", f"{BASE}/model-test")
    names = [f"{name}.json" for name in records]
    tables = [f"tables/{name}.csv" for name in ("cache", "ranks", "paper", "floors", "storage")]
    pictures = [f"figures/{name}.png" for name in CAPTIONS]
    _copy([run / name for name in (*names, *tables, *pictures, "figures/watch.gif")], reference)
    if (run / CURVE).exists():
        _copy([run / CURVE], reference)
    table = pd.read_csv(reference / "cache.csv")
    draw_policies(table, reference / "policies.png")
    draw_agreement(table, reference / "likelihood-fid.png")
    put_block(readme, numbers(reference))
    put_block(documents / "policies.md", policy_numbers(reference))
    put_block(documents / "adapting.md", adapting_numbers(reference))


def publish_efficiency(run: Path, reference: Path, document: Path, readme: Path) -> None:
    """Make a finished efficiency experiment the tracked one: write the numbers of docs/engine.md
    from it, and the large grids of the paper's table."""
    tables = [run / f"tables/{name}.csv" for name in ("efficiency", "scaling", "choices")]
    _copy([*tables, run / "figures/efficiency.png"], reference)
    put_block(document, engine_numbers(reference))
    paper, table = (pd.read_csv(reference / f"{name}.csv") for name in ("paper", "efficiency"))
    trained = paper[~paper["shape"].isin(list(SHAPES))]
    wide = table[
        (table["shape"] == PAPER_SHAPE)
        & table["grid"].isin(PAPER_GRIDS)
        & (table["batch"] == PAPER_BATCH)
        & (table["dtype"] == "float32")
        & ((table["storage"] == "float16") | (table["engine"] == "stock"))
    ]
    together = pd.concat([trained, large_grids(wide)], ignore_index=True)
    write_text(reference / "paper.csv", together.to_csv(index=False, float_format="%.6g"))
    put_block(readme, numbers(reference))


def publish_table(
    table: list[Path], name: str, reference: Path, documents: Path, readme: Path | None = None
) -> None:
    """Track a table of another experiment under a name, of a whole run its samples and its origin
    too, of several runs one under the other, and write the numbers of the pages in `documents`,
    and of the README, anew."""
    if len(table) > 1:
        together = pd.concat(
            [pd.read_csv(path).assign(run=path.parent.parent.name) for path in _finished(table)]
        )
        write_text(reference / f"{name}.csv", together.to_csv(index=False, float_format="%.6g"))
    else:
        _copy(table, reference, f"{name}.csv")
        if table[0].name == "cache.csv":
            run = table[0].parent.parent
            _copy([run / "figures/samples.png"], reference, f"{name}-samples.png")
            _copy([run / "provenance.json"], reference, f"{name}-provenance.json")
    if name == "ablations":
        draw_ablations(pd.read_csv(table[0]), reference / "ablations.png")
    put_block(documents / "policies.md", policy_numbers(reference))
    put_block(documents / "adapting.md", adapting_numbers(reference))
    put_block(documents / "engine.md", engine_numbers(reference))
    if readme:
        put_block(readme, numbers(reference))


def document_config(document: Path) -> None:
    """Write the keys of the experiment, from the schema, between the marks of a page."""
    put_block(document, describe_config())


def _finished(sources: list[Path]) -> list[Path]:
    for source in sources:
        if not source.exists():
            raise FewlinesError(f"{source} is missing; finish the run with 'snakemake' first")
    return sources


def _copy(sources: list[Path], reference: Path, name: str | None = None) -> None:
    for source in _finished(sources):
        with replacing(reference / (name or source.name)) as temporary:
            shutil.copyfile(source, temporary)
