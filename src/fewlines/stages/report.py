"""Tables, figures and the report of a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from fewlines.config import Experiment
from fewlines.errors import FewlinesError
from fewlines.files import replacing, write_json
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.figures import draw_lines, draw_memory, draw_quality, draw_samples
from fewlines.report.page import CAPTIONS, write_page
from fewlines.report.provenance import provenance as describe_run
from fewlines.report.readme import put_numbers
from fewlines.report.results import Results
from fewlines.report.tables import (
    cache_table,
    floor_table,
    network_table,
    paper_table,
    readable_table,
    write_table,
)
from fewlines.report.tables import likelihood_table as likelihoods


def tables(config: Experiment, run: Path) -> None:
    """Write the tables of a run's folder as CSV, Markdown and LaTeX."""
    results, output = Results(config, run), run / "tables"
    write_table(cache_table(results), output, "cache")
    write_table(paper_table(results), output, "paper")
    write_table(floor_table(results), output, "floors")


def likelihood_table(config: Experiment, run: Path) -> None:
    """Write the table of likelihoods alone, of all caches of the experiment."""
    results = Results(config, run)
    write_table(likelihoods(results), run / "tables", "likelihood")


def figures(config: Experiment, run: Path) -> None:
    """Draw the figures of a run's folder."""
    results, output = Results(config, run), run / "figures"
    tokenizer = load_network(run / "tokenizer.safetensors", Tokenizer)
    draw_quality(cache_table(results), floor_table(results), output / "quality.png")
    draw_samples(results, tokenizer, output / "samples.png")
    draw_memory(results, output / "memory.png")
    draw_lines(results, output / "lines.png")


def report(config: Experiment, run: Path, output: Path, provenance: Path) -> None:
    """Write the report, one HTML file, and where its numbers come from."""
    results = Results(config, run)
    facts = describe_run(config, Path.cwd())
    write_json(provenance, facts)
    readable = {
        "cache": readable_table(cache_table(results)),
        "paper": readable_table(paper_table(results)),
        "floors": readable_table(floor_table(results)),
        "networks": network_table(results),
    }
    pictures = {name: run / f"figures/{name}.png" for name in CAPTIONS}
    write_page(output, readable, pictures, facts)


def publish(run: Path, reference: Path, readme: Path) -> None:
    """Make a finished run the tracked one, and write the README's numbers from it."""
    names = [
        f"{name}.json" for name in ("provenance", "tokenizer", "classifier", "model", "model-test")
    ]
    tables = [f"tables/{name}.csv" for name in ("cache", "paper", "floors")]
    pictures = [f"figures/{name}.png" for name in ("quality", "samples", "memory", "lines")]
    for name in (*names, *tables, *pictures):
        source = run / name
        if not source.exists():
            raise FewlinesError(f"{source} is missing; finish the run with 'snakemake' first")
        with replacing(reference / source.name) as temporary:
            shutil.copyfile(source, temporary)
    put_numbers(readme, reference)
