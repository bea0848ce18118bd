"""Parquet files in the layouts that Hugging Face's data sets have."""

from __future__ import annotations

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fewlines.data import SOURCES
from fewlines.errors import FewlinesError

load = SOURCES["parquet"]


def picture(number: int) -> bytes:
    """A PNG of one colour that tells its number."""
    content = io.BytesIO()
    Image.new("RGB", (20, 16), (number, number // 2, 7)).save(content, "PNG")
    return content.getvalue()


def write(path, numbers, names=(), *, struct=True, **columns) -> None:
    """A file whose rows are in small groups."""
    pictures = [picture(number) for number in numbers]
    if struct:
        pictures = [{"bytes": each, "path": None} for each in pictures]
    columns = {"image": pictures, "label": [number % 3 for number in numbers], **columns}
    table = pyarrow.table({name: column for name, column in columns.items() if column is not None})
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(said), path, row_group_size=7)


def seen(split) -> dict[int, int]:
    """Class numbers by the number that each picture tells."""
    numbers = split.images[:, 0, 3, 3].tolist()
    return dict(zip(numbers, split.labels.tolist(), strict=True))


@pytest.mark.parametrize("struct", [True, False])
def test_pictures_are_read_with_their_classes(tmp_path, struct):
    write(tmp_path / "train-00000-of-00002.parquet", range(40), struct=struct)
    write(tmp_path / "train-00001-of-00002.parquet", range(40, 60), struct=struct)
    data = load(tmp_path, 8)
    assert list(data.classes) == ["0", "1", "2"]
    train, test = seen(data.train), seen(data.test)
    assert train | test == {number: number % 3 for number in range(60)}
    assert not train.keys() & test.keys()
    assert 2 <= len(test) <= 15
    assert torch.equal(load(tmp_path, 8).train.images, data.train.images)


def test_files_of_a_test_set_are_it_and_classes_have_their_names(tmp_path):
    names = ["cat", "dog", "cow", "hen"]
    write(tmp_path / "train-00000-of-00001.parquet", range(20), names)
    write(tmp_path / "validation-00000-of-00001.parquet", range(20, 25), names)
    data = load(tmp_path, 8)
    assert seen(data.test).keys() == {*range(20, 25)}
    assert list(data.classes) == names


def test_pictures_without_classes_are_of_one(tmp_path):
    write(tmp_path / "a.parquet", range(30), label=None)
    data = load(tmp_path, 8)
    assert list(data.classes) == ["0"]
    assert len(data.train) + len(data.test) == 30


def test_files_that_cannot_be_used_are_explained(tmp_path):
    with pytest.raises(FewlinesError, match="'parquet' needs the folder"):
        load(None)
    with pytest.raises(FewlinesError, match=r"is no folder of \.parquet files"):
        load(tmp_path)
    file = tmp_path / "a.parquet"
    for columns, message in (
        ({"image": None}, "it needs one of pictures"),
        ({"other": [b""] * 4}, "it needs one of pictures"),
        ({"label": list("abcd")}, "whole numbers named label"),
        ({"label": [0, 1, -1, 2]}, "classes are numbers from 0"),
        ({"label": [0, None, 1, 2]}, "classes are numbers from 0"),
    ):
        write(file, range(4), **columns)
        with pytest.raises(FewlinesError, match=message):
            load(tmp_path)
    write(tmp_path / "test-0.parquet", range(4), label=None)
    write(file, range(4))
    with pytest.raises(FewlinesError, match=r"a\.parquet has classes and .*0\.parquet has none"):
        load(tmp_path)
    (tmp_path / "test-0.parquet").unlink()
    write(file, range(1))
    with pytest.raises(FewlinesError, match="hold too few pictures"):
        load(tmp_path)
    write(file, range(4), image=[picture(0), b"no picture", None, picture(3)])
    with pytest.raises(FewlinesError, match=r"a\.parquet: row [12] cannot be read as an image"):
        load(tmp_path).save(tmp_path / "out")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewlinesError, match="is no whole Parquet file"):
        load(tmp_path)
