from __future__ import annotations

import pytest
import torch

from fewlines.errors import FewlinesError
from fewlines.files import (
    digest_folder,
    filling_tensors,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
)


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


def test_what_a_link_leads_to_is_digested(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(b"one")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures/again").symlink_to(tmp_path / "pictures")
    before = digest_folder(tmp_path / "pictures")
    assert digest_folder(tmp_path / "pictures") == before
    (tmp_path / "elsewhere/a.png").write_bytes(b"two")
    assert digest_folder(tmp_path / "pictures") != before


def test_a_file_that_no_disk_holds_is_said_before_it_is_filled(tmp_path):
    shapes, dtypes = {"a": (2**61,)}, {"a": "U8"}
    with (
        pytest.raises(OSError, match=r"too large|space"),
        filling_tensors(tmp_path / "large", shapes, dtypes, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / ".a.safetensors.17.tmp").write_bytes(b"half of it")
    (tmp_path / ".b.safetensors.17.tmp").write_bytes(b"another's")
    with filling_tensors(tmp_path / "a.safetensors", {"a": (2,)}, {"a": "U8"}, {}) as arrays:
        arrays["a"][:] = 7
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", ".b.safetensors.17.tmp"}
    assert read_tensors(tmp_path / "a.safetensors")[0]["a"].tolist() == [7, 7]


def test_damaged_json_is_explained(tmp_path):
    (tmp_path / "file.json").write_text("{")
    with pytest.raises(FewlinesError, match="not valid JSON"):
        read_json(tmp_path / "file.json")
