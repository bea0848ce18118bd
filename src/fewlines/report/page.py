"""`report.html`: one file that opens without a server, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from fewlines.files import write_text

CAPTIONS = {
    "quality": "FID and likelihood of every cache against its memory and time; adapted models "
    "against a full cache that had as many steps. Bars: standard deviation over seeds, and 95% "
    "intervals over held-out images. Times are relative to the lean "
    "full cache in the same interleaved run.",
    "samples": "The same classes and the same noise under each cache.",
    "memory": "Resident memory above the loaded weights while one batch is decoded, every "
    "configuration in a process of its own.",
    "lines": "How far the base model's distribution under each cache is from that under the full "
    "cache, by line of the image.",
    "budgets": "Likelihood lost against the size of the cache: the base model against its own full "
    "cache, adapted models against the full cache of a model trained for as many more steps. Bars: "
    "95% intervals over held-out images.",
    "heads": "Of every head: where it looks, by lines up and columns aside (its own line at the "
    "bottom), and which tokens (across) the schedule lets it keep at each step (down).",
}


def write_page(
    output: Path,
    claim: str,
    tables: Mapping[str, pd.DataFrame],
    certainty: Sequence[str],
    figures: Mapping[str, Path],
    facts: Mapping[str, Any],
) -> None:
    """Fill the template with the claim, tables (as text already), what is certain of the ranks,
    figures (PNG files) and facts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewlines", "report"), autoescape=True
    )
    page = environment.get_template("page.html").render(
        tables={
            name: Markup(table.to_html(index=False, border=0, classes="data"))
            for name, table in tables.items()
        },
        figures={
            name: base64.b64encode(path.read_bytes()).decode() for name, path in figures.items()
        },
        captions=CAPTIONS,
        claim=claim,
        certainty=certainty,
        facts=facts,
    )
    write_text(output, page)
