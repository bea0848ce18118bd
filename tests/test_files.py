from __future__ import annotations

import pytest
import torch

from fewlines.errors import FewlinesError
from fewlines.files import read_json, read_tensors, replacing, write_json, write_tensors


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    header = {"kind": "test", "shape": {"side": 2}, "grid": (2, 3)}
    for name in ("one", "other"):
        write_tensors(tmp_path / name, tensors, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    again, read = read_tensors(tmp_path / "one")
    assert read == {"kind": "test", "shape": {"side": 2}, "grid": [2, 3]}
    assert torch.equal(again["a"], tensors["a"])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": True})
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_explained(tmp_path):
    (tmp_path / "file.json").write_text("{")
    with pytest.raises(FewlinesError, match="not valid JSON"):
        read_json(tmp_path / "file.json")
