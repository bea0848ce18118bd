from __future__ import annotations

import numpy as np

import fewlines
from conftest import calibrated
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry
from fewlines.report.heads import LEFT, average_by_offset, draw_heads, make_region_table


def test_attention_is_averaged_by_offset_over_queries_that_have_it(tmp_path):
    """A head that looks one line up and one column left whenever there is such a token."""
    height, width = 5, 6
    n = height * width
    attention = np.zeros((1, 1, n, n), np.float32)
    for query in range(n - 1):
        if query >= width and query % width:
            attention[0, 0, query, query - width - 1] = 1
    found = average_by_offset(Calibration(attention, (height, width), images=1))[0, 0]
    assert found[1, LEFT - 1] == 1
    assert found.sum() == 1
    geometry = Geometry((height, width), prefix=1, layers=1, heads=1)
    cache = calibrated(fewlines.cache("scheduled", lines=2, merge=True), geometry)
    draw_heads(cache.calibration, cache.plan(geometry), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_regions_share_what_a_query_looks_at():
    """Every token gets a hundredth; the class gets the rest. Four lines of five columns."""
    attention = np.tri(20, dtype=np.float32)[None, None] * 0.01
    attention = np.concatenate([attention, attention * 2], axis=1)
    table = make_region_table(Calibration(attention, (4, 5), images=1)).set_index(
        ["line", "region"]
    )
    # Of line 4, whose last token is never a query: tokens 15 … 18.
    tokens = {"class": 1, "own line": 2.5, "line above": 5, "first line": 5, "left edge": 1}
    tokens |= {"right edge": 1, "elsewhere": 3}
    assert table["tokens"][4].to_dict() == tokens
    for region in ("own line", "line above", "first line", "left edge", "elsewhere"):
        assert np.isclose(table["attention"][4, region], 0.015 * tokens[region])
        assert np.isclose(table["most"][4, region], 0.02 * tokens[region])
    assert np.isclose(table["attention"][4, "class"], 1 - 0.015 * 17.5)
    # The first line is its own, the second has it above.
    assert table["attention"][1, "first line"] == table["attention"][2, "first line"] == 0
    assert table["tokens"][2, "line above"] == 5
    assert np.allclose(table.groupby("line")["attention"].sum(), 1)
