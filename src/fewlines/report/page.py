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
    "curves": "Likelihood lost against the size of the cache: the base model against its own full "
    "cache, adapted models against the full cache of a model trained for as many more steps. Bars: "
    "95% intervals over held-out images.",
    "quality": "FID and likelihood of every cache against its memory and time. Bars: standard "
    "deviation over seeds, and 95% intervals over held-out images. Times are relative to the "
    "length-exact full cache in the same interleaved run.",
    "samples": "The same classes and the same noise under each cache; left, the tokens that a head "
    "of the middle layer holds (blue) and has evicted (light) when three quarters are drawn.",
    "memory": "Resident memory above the loaded weights while one batch is decoded, every "
    "configuration in a process of its own.",
    "lines": "How far the base model's distribution under each cache is from that under the full "
    "cache, by line of the image.",
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
    """Fill the template.

    Args:
        output: HTML to write.
        claim: what the run shows, in a paragraph.
        tables: as text already.
        certainty: what is certain of the ranks, a sentence for each budget.
        figures: PNG files by name; each has a twin for dark pages.
        facts: where the numbers come from.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewlines", "report"), autoescape=True
    )
    page = environment.get_template("page.html").render(
        tables={
            name: Markup(table.to_html(index=False, border=0, classes="data"))
            for name, table in tables.items()
        },
        figures={name: _encode(path) for name, path in figures.items()},
        dark={name: _encode(path.with_stem(f"{path.stem}-dark")) for name, path in figures.items()},
        captions=CAPTIONS,
        claim=claim,
        certainty=certainty,
        facts=facts,
    )
    write_text(output, page)


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
