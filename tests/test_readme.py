"""The README says what the tracked run measured, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from fewlines.report.adapting import adapting_numbers
from fewlines.report.config_page import describe_config
from fewlines.report.engine import engine_numbers
from fewlines.report.policies import policy_numbers
from fewlines.report.readme import END, START, numbers, put_block

from fewlines.errors import FewlinesError

REPOSITORY = Path(__file__).parent.parent
REFERENCE = REPOSITORY / "results/reference"


@pytest.mark.parametrize(
    ("document", "written"),
    [
        ("README.md", numbers),
        ("docs/engine.md", engine_numbers),
        ("docs/policies.md", policy_numbers),
        ("docs/adapting.md", adapting_numbers),
        ("docs/config.md", lambda _: describe_config()),
    ],
)
def test_the_numbers_are_those_of_the_reference_run(document, written):
    assert f"{START}\n\n{written(REFERENCE)}\n\n{END}" in (REPOSITORY / document).read_text()


def test_putting_numbers_leaves_the_rest_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    put_block(readme, "new")
    assert readme.read_text() == f"before\n{START}\n\nnew\n\n{END}\nafter\n"
    readme.write_text("nothing to replace")
    with pytest.raises(FewlinesError, match="no block for numbers"):
        put_block(readme, "new")


def test_every_link_leads_somewhere():
    for page in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("table", sorted(REFERENCE.glob("*.csv")), ids=lambda path: path.stem)
def test_every_column_is_explained(table):
    page = (REPOSITORY / "docs/reading-the-tables.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page))
    ends = ("_low", "_high")
    columns = {name for name in pd.read_csv(table).columns if not name.endswith(ends)}
    assert columns <= explained
