"""A folder of Parquet files, as Hugging Face keeps its data sets: a column of pictures, each the
bytes of a picture's file, and one of class numbers named `label`, or no classes at all.

Files whose names begin with `test` or `val` are the test set; where there are none, a tenth of the
pictures, chosen by their places. Classes are read first, pictures when they are needed, some rows
at a time: the files may be larger than memory. Pictures are fitted as those of a folder are.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewlines.data.folder import (
    AT_ONCE,
    SIDE,
    TEST_SHARE,
    choose_test,
    put_aside,
    read_all,
    read_picture,
    refuse_some_classes,
)
from fewlines.data.images import ImageData, Stream
from fewlines.data.webdataset import HELD_OUT
from fewlines.errors import FewlinesError

LABEL = "label"


@dataclass(frozen=True)
class Rows:
    """Rows of a file that are of one part of the data.

    Attributes:
        file: that they are in.
        picture: the column of pictures.
        labels: class number of each row of the file, `(n,)`; of class 0 all, where `labelled` is
            not so.
        labelled: whether the file says them.
        names: of the classes, where the file says them.
        chosen: which rows these are, of each row.
    """

    file: Path
    picture: str
    labels: Sequence[int]
    labelled: bool
    names: tuple[str, ...]
    chosen: Sequence[bool]


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Find the pictures in the Parquet files under `path`.

    Raises:
        FewlinesError: no path, no such files, one that is damaged or holds no pictures, or no
            pyarrow to read them with.
    """
    if path is None:
        raise FewlinesError("data.path: 'parquet' needs the folder of your .parquet files")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else []
    if not files:
        raise FewlinesError(f"data.path: {path} is no folder of .parquet files")
    every = [_read_rows(file) for file in files]
    refuse_some_classes((rows.file, rows.labelled) for rows in every)
    train, test = put_aside(every, [rows.file.name.startswith(HELD_OUT) for rows in every])
    if train and not test:
        train, test = _put_aside(train)
    counted = [sum(sum(rows.chosen) for rows in part) for part in (train, test)]
    if min(counted) == 0:
        raise FewlinesError(f"data.path: the files of {path} hold too few pictures to learn from")
    learned, held_out = (_stream(each, SIDE if side is None else side) for each in (train, test))
    return ImageData(learned, held_out, _name_classes(every))


def _read_rows(path: Path) -> Rows:
    with _open(path) as file:
        schema = file.schema_arrow
        kinds = {field.name: field.type for field in schema}
        pictures = [name for name, kind in kinds.items() if _holds_bytes(kind)]
        labelled = LABEL in kinds
        if len(pictures) != 1 or (labelled and not str(kinds[LABEL]).lstrip("u").startswith("int")):
            raise FewlinesError(
                f"{path} has the columns {', '.join(schema.names)}; it needs one of pictures, as "
                f"bytes, and one of whole numbers named {LABEL}, or none where there are no classes"
            )
        labels = [0] * file.metadata.num_rows
        if labelled:
            labels = file.read([LABEL])[LABEL].to_pylist()
        if None in labels or min(labels, default=0) < 0:
            raise FewlinesError(f"{path}: classes are numbers from 0, in every row")
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = said.get("info", {}).get("features", {}).get(LABEL, {}).get("names", [])
    return Rows(path, pictures[0], labels, labelled, tuple(names), [True] * len(labels))


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds the bytes of files, alone or with their paths."""
    if str(kind).startswith("struct<") and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return str(kind) in ("binary", "large_binary")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FewlinesError("Parquet is read by pyarrow: pip install 'fewlines[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise FewlinesError(f"{path} is no whole Parquet file ({error})") from None


def _put_aside(train: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    places = [Path(rows.file.stem, str(row)) for rows in train for row in range(len(rows.labels))]
    held = iter(choose_test(places, TEST_SHARE))
    parts: tuple[list[Rows], list[Rows]] = ([], [])
    for rows in train:
        of_file = list(itertools.islice(held, len(rows.labels)))
        for part, test in zip(parts, (False, True), strict=True):
            chosen = [each == test for each in of_file]
            part.append(replace(rows, chosen=chosen))
    return parts


def _name_classes(every: Sequence[Rows]) -> list[str]:
    count = max(max(rows.labels, default=0) for rows in every) + 1
    names = {rows.names for rows in every}
    said = list(names.pop()) if len(names) == 1 else []
    return said if len(said) >= count else [str(number) for number in range(count)]


def _stream(part: Sequence[Rows], side: int) -> Stream:
    labels = [label for rows in part for label in itertools.compress(rows.labels, rows.chosen)]
    return Stream(torch.tensor(labels), side, partial(_read, part, side))


def _read(part: Sequence[Rows], side: int) -> Iterator[Tensor]:
    for rows in part:
        places = iter(enumerate(rows.chosen))
        with _open(rows.file) as file:
            for batch in file.iter_batches(AT_ONCE, columns=[rows.picture]):
                cells = zip(batch.column(0).to_pylist(), places, strict=False)
                held = [(cell, row) for cell, (row, chosen) in cells if chosen]
                yield from read_all(held, partial(_read_cell, rows.file, side))


def _read_cell(file: Path, side: int, cell: tuple[dict[str, bytes] | bytes | None, int]) -> Tensor:
    content, row = cell
    content = content["bytes"] if isinstance(content, dict) else content
    return read_picture(io.BytesIO(content or b""), side, f"{file}: row {row}")
