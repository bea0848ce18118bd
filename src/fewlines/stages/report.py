"""Tables, figures and the report of a run's folder."""

from __future__ import annotations

from pathlib import Path

from fewlines.config import Experiment
from fewlines.files import read_shapes, write_json
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.architectures import draw_architectures, make_architecture_table
from fewlines.report.claim import state_claim
from fewlines.report.figures import (
    draw_curves,
    draw_lines,
    draw_memory,
    draw_quality,
    draw_samples,
)
from fewlines.report.grids import draw_grids, fit_growth, read_grids
from fewlines.report.heads import draw_heads, make_region_table
from fewlines.report.page import write_page
from fewlines.report.paper import make_paper_table
from fewlines.report.provenance import collect_stamps, describe_run
from fewlines.report.ranks import describe_ranks
from fewlines.report.readable import make_readable, write_table
from fewlines.report.results import Results
from fewlines.report.tables import (
    make_cache_table,
    make_correlation_table,
    make_likelihood_table,
    make_lines_table,
    make_network_table,
    make_quality_table,
    make_rank_table,
    make_reference_table,
    make_storage_table,
)


def tables(config: Experiment, run: Path) -> None:
    """Write the tables of a run as CSV, Markdown and LaTeX.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    results, output = Results(config, run), run / "tables"
    cache = make_cache_table(results)
    write_table(cache, output, "cache")
    write_table(make_correlation_table(cache), output, "correlations")
    write_table(make_reference_table(results), output, "reference-scores")
    if config.family.has_kv_cache:
        write_table(make_storage_table(results), output, "storage")
        write_table(make_rank_table(results), output, "ranks")


def likelihood_table(config: Experiment, run: Path) -> None:
    """Write the table of likelihoods alone, of all caches of the experiment.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    write_table(make_likelihood_table(Results(config, run)), run / "tables", "likelihood")


def lines_table(config: Experiment, run: Path) -> None:
    """Write where in the image caches hurt, and what the queries of each line look at.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    results, output = Results(config, run), run / "tables"
    write_table(make_lines_table(results), output, "lines")
    write_table(make_region_table(results.calibration), output, "regions")


def paper_table(config: Experiment, run: Path) -> None:
    """Write the paper's comparison: time, memory and FID of the full cache and of few lines.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    write_table(make_paper_table(Results(config, run)), run / "tables", "paper")


def architectures_table(config: Experiment, run: Path) -> None:
    """Write the table and the figures of the transformer's caches beside other families.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    results = Results(config, run)
    table = make_architecture_table(results)
    write_table(table, run / "tables", "architectures")
    draw_architectures(table, run / "figures/architectures.png")
    drawn = [row for row in config.architecture_rows if config.is_drawn(row[1], row[0])]
    tokenizer = load_network(run / "tokenizer.safetensors", Tokenizer)
    draw_samples(results, drawn, tokenizer, run / "figures/architectures-samples.png")


def grids_table(run: Path, table: list[Path]) -> None:
    """Write the table and the figure of the same caches on several grids: what a cache must hold
    as the grid grows.

    Args:
        run: the folder of one of them in results.
        table: `cache.csv` or `likelihood.csv` of a grid; given again for each.
    """
    rows = read_grids(table)
    write_table(fit_growth(rows), run / "tables", "grids")
    draw_grids(rows, run / "figures/grids.png")


def quality_table(config: Experiment, run: Path) -> None:
    """Write the table of all rows that have samples, without times.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    write_table(make_quality_table(Results(config, run)), run / "tables", "quality")


def figures(config: Experiment, run: Path) -> None:
    """Draw the figures of a run.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    results, output = Results(config, run), run / "figures"
    tokenizer = load_network(run / "tokenizer.safetensors", Tokenizer)
    table = make_cache_table(results)
    draw_quality(table, make_reference_table(results), output / "quality.png")
    draw_samples(results, config.pictured_rows, tokenizer, output / "samples.png")
    network = results.load_network()
    if isinstance(network, AttentionModel):
        draw_lines(results, output / "lines.png")
        draw_curves(table, output / "curves.png")
        planned = [slug for slug, cache in config.cache_by_slug.items() if cache.requires]
        static = [
            plan
            for slug in planned
            for plan in [results.get_cache(slug).plan(network.geometry)]
            if plan.victims is not None
        ]
        if config.has_schedule:
            draw_heads(results.calibration, static[-1], output / "heads.png")
    if config.paper_caches:
        draw_memory(results, output / "memory.png")


def report(config: Experiment, run: Path, tokens: Path, output: Path, provenance: Path) -> None:
    """Write the report, one HTML file, and where its numbers come from.

    Args:
        config: the experiment.
        run: its folder in results.
        tokens: of its images; they say whose these are, where their source knows.
        output: HTML to write.
        provenance: JSON to write.
    """
    results = Results(config, run)
    origins = read_shapes(tokens)[1].get("origins", [])
    facts = {
        **describe_run(config, Path.cwd()),
        "images": "; ".join(origins),
        "measured": collect_stamps(run),
    }
    write_json(provenance, facts)
    table = make_cache_table(results)
    paper = make_paper_table(results) if config.paper_caches else table.iloc[:0]
    ranks = make_rank_table(results) if config.family.has_kv_cache else table.iloc[:0]
    readable = {
        "headlines": make_readable(table.dropna(subset="seconds_per_image")),
        "cache": make_readable(table),
        "reference": make_readable(make_reference_table(results)),
        "networks": make_network_table(results),
    }
    if config.paper_caches:
        readable["paper"] = make_readable(paper)
    if config.family.has_kv_cache:
        readable["ranks"] = make_readable(ranks)
        readable["storage"] = make_readable(make_storage_table(results))
    shown = {name: run / f"figures/{name}.png" for name in config.figures}
    sentences = describe_ranks(ranks) if len(ranks) else []
    write_page(output, state_claim(results, table, paper), readable, sentences, shown, facts)
