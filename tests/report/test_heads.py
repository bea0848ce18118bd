from __future__ import annotations

import numpy as np

import fewlines
from conftest import calibrated
from fewlines.calibration.data import Calibration
from fewlines.geometry import Geometry
from fewlines.report.heads import LEFT, average_by_offset, draw_heads


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
