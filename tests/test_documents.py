"""Documents say what the tracked tables say, and lead where they point."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from fewlines.cli import main
from fewlines.errors import FewlinesError
from fewlines.report.blocks import fill

REPOSITORY = Path(__file__).parent.parent
REFERENCE = REPOSITORY / "results/reference"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_stale(page):
    assert main(["fill-blocks", f"--document={page}", f"--reference={REFERENCE}", "--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_table_on_a_page_has_at_most_seven_columns(page):
    for line in page.read_text().splitlines():
        assert not line.startswith("|") or len(re.split(r"(?<!\\)\|", line)) - 2 <= 7, line


TABLE = """model,policy,budget,capacity,nll_delta,nll_delta_low,nll_delta_high,kv_bytes
base,lines,lines: 3,43,0.2,0.1,0.3,2e6
base,mine,lines: 3,43,0.02,0.01,0.03,2e6
base,mine,lines: 2,29,0.04,0.03,0.05,1e6
"""


@pytest.fixture
def reference(tmp_path) -> Path:
    (tmp_path / "some.csv").write_text(TABLE)
    (tmp_path / "runs").mkdir()
    for run, loss in (("a", 0.1), ("b", 0.3)):
        (tmp_path / f"runs/{run}.csv").write_text(TABLE.replace("0.02,", f"{loss},"))
    return tmp_path


BLOCKS = [
    (
        "table: some\nwhere: \"policy == 'mine'\"\nsort: capacity\n"
        "columns: {budget: budget, ΔNLL: nll_delta | ±.3f, MB: kv_bytes / 1e6 | .1f}",
        ["| lines: 2 | +0.040 ± 0.010 | 1.0 |", "| lines: 3 | +0.020 ± 0.010 | 2.0 |"],
    ),
    (
        "table: some\nrows: policy\nacross: budget\nvalue: nll_delta | .2f",
        ["| policy | lines: 2 | lines: 3 |", "| mine | 0.04 | 0.02 |", "| lines | | 0.20 |"],
    ),
    (
        "table: runs/*\ngroup: [policy, budget]\ncolumns: {cache: name, loss: nll_delta | .2f}",
        ["| lines, lines: 3 | 0.20 |", "| mine, lines: 3 | 0.20 (0.10 … 0.30) |"],
    ),
]


@pytest.mark.parametrize(("spec", "rows"), BLOCKS)
def test_a_block_is_filled_from_its_table(reference, spec, rows):
    text = f"before\n<!-- block\n{spec}\n-->\nold\n<!-- end -->\nafter\n"
    filled = fill(text, reference)
    lines = [re.sub(" +", " ", line) for line in filled.splitlines()]
    assert [line for line in lines if line in rows] == rows
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert fill(filled, reference) == filled


def test_a_number_in_a_sentence_is_filled_and_the_next_block_left_alone(reference):
    where = "policy == 'mine' and budget == 'lines: 3'"
    text = "".join(
        f"<!-- value runs/* | {where} | nll_delta | {form} -->x<!-- end -->;"
        for form in (".2f", "min .2f", "max .2f")
    )
    assert re.findall("-->([^<;]*)<", fill(text, reference)) == ["0.20", "0.10", "0.30"]


def test_what_is_not_there_is_named(reference):
    with pytest.raises(FewlinesError, match="names the table 'other'"):
        fill("<!-- block\ntable: other\ncolumns: {}\n-->\n<!-- end -->", reference)
    with pytest.raises(FewlinesError, match="says colums; it may say across, columns"):
        fill("<!-- block\ntable: some\ncolums: {}\n-->\n<!-- end -->", reference)
    with pytest.raises(FewlinesError, match="no row is like that"):
        fill("<!-- value some | policy == 'your' | nll_delta | .1f -->x<!-- end -->", reference)
    with pytest.raises(FewlinesError, match=r"asks where .*: "):
        fill("<!-- value some | [n for n in (1,)] | nll | .1f -->x<!-- end -->", reference)
    block = "table: runs/*\nrows: policy\nacross: budget\nvalue: capacity | g"
    with pytest.raises(FewlinesError, match="several rows of the same policy and budget"):
        fill(f"<!-- block\n{block}\n-->\n<!-- end -->", reference)
    with pytest.raises(FewlinesError, match="shows fid_mean: "):
        fill("<!-- block\ntable: some\ncolumns: {FID: fid_mean}\n-->\n<!-- end -->", reference)


def test_a_stale_block_is_refused_and_filled(reference, capsys):
    page = reference / "page.md"
    page.write_text("<!-- value some | policy == 'lines' | nll_delta | .1f -->0.9<!-- end -->")
    command = ["fill-blocks", f"--document={page}", f"--reference={reference}"]
    assert main([*command, "--check"]) == 2
    assert "a block is stale" in capsys.readouterr().err
    assert main(command) == 0
    assert ">0.2<" in page.read_text()
    assert main([*command, "--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_number_breaks_its_paragraph(page):
    """A line that begins with a comment ends the paragraph before it."""
    assert not re.search(r"^ {0,3}<!-- value", page.read_text(), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if not path.startswith("https://"):
            found = page.parent / path if path else page
            assert found.exists(), path
            assert not anchor or anchor in anchors(found), f"{path}#{anchor}"


@pytest.mark.parametrize(
    "table", sorted(REFERENCE.rglob("*.csv")), ids=lambda path: str(path.relative_to(REFERENCE))
)
def test_every_column_is_explained(table):
    page = (REPOSITORY / "docs/reading-the-tables.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page))
    ends = ("_low", "_high")
    columns = {name for name in pd.read_csv(table).columns if not name.endswith(ends)}
    assert columns <= explained


def test_the_package_knows_no_page_of_this_repository():
    """Prose about our study lives in Markdown."""
    for path in (REPOSITORY / "src").rglob("*"):
        if path.suffix in (".py", ".html"):
            text = path.read_text()
            assert "README.md" not in text, path
            assert not re.search(r"docs/\w+\.md", text), path
            assert "results/reference" not in text.replace("results/reference/<", ""), path
