"""The README says what the tracked run measured, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewlines.errors import FewlinesError
from fewlines.report.readme import END, START, numbers, put_numbers

REPOSITORY = Path(__file__).parent.parent
REFERENCE = REPOSITORY / "results/reference"


def test_the_numbers_are_those_of_the_reference_run():
    assert numbers(REFERENCE) in (REPOSITORY / "README.md").read_text()


def test_putting_numbers_leaves_the_rest_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    put_numbers(readme, REFERENCE)
    assert readme.read_text() == f"before\n{numbers(REFERENCE)}\nafter\n"
    readme.write_text("nothing to replace")
    with pytest.raises(FewlinesError, match="no block for numbers"):
        put_numbers(readme, REFERENCE)


def test_every_link_leads_somewhere():
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (REPOSITORY / target).exists(), f"{page.name}: {target}"
