"""A folder of Parquet files, as Hugging Face keeps its data sets: a column of pictures, each the
bytes of a picture's file, and one of class numbers named `label`, or no classes at all. Pictures
are fitted as those of a folder are, and read some rows at a time."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewlines.data.folder import AT_ONCE, read_all, read_picture
from fewlines.data.images import ImageData
from fewlines.data.packed import Picture, load_packed
from fewlines.errors import FewlinesError

LABEL = "label"


def load(path: Path | None = None, side: int | None = None) -> ImageData:
    """Find the pictures in the Parquet files under `path`, and the names of their classes where all
    files say the same; see `load_packed`.

    Raises:
        FewlinesError: beside what `load_packed` refuses, no pyarrow to read them with.
    """
    said: set[tuple[str, ...]] = set()
    data = load_packed("parquet", ".parquet", path, side, partial(_list_rows, said), _read)
    names = said.pop() if len(said) == 1 else ()
    return replace(data, classes=names) if len(names) >= len(data.classes) else data


def _list_rows(said: set[tuple[str, ...]], path: Path) -> Iterator[Picture]:
    """The rows of a file; what it says of its classes' names is added to `said`."""
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
        labels = file.read([LABEL])[LABEL].to_pylist() if labelled else []
        if None in labels or min(labels, default=0) < 0:
            raise FewlinesError(f"{path}: classes are numbers from 0, in every row")
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = features.get("info", {}).get("features", {}).get(LABEL, {}).get("names", [])
        said.add(tuple(names))
        for row in range(file.metadata.num_rows):
            yield Picture(path, str(row), labels[row] if labelled else None, pictures[0])


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


def _read(part: Sequence[Picture], side: int) -> Iterator[Tensor]:
    for path, rows in itertools.groupby(part, key=lambda each: each.file):
        of_row = {int(each.name): each for each in rows}
        column, places = next(iter(of_row.values())).place, itertools.count()
        with _open(path) as file:
            for batch in file.iter_batches(AT_ONCE, columns=[column]):
                cells = zip(batch.column(0).to_pylist(), places, strict=False)
                wanted = [(cell, of_row[row]) for cell, row in cells if row in of_row]
                yield from read_all(wanted, partial(_read_cell, side))


def _read_cell(side: int, cell: tuple[dict[str, bytes] | bytes | None, Picture]) -> Tensor:
    content, row = cell
    content = content["bytes"] if isinstance(content, dict) else content
    return read_picture(io.BytesIO(content or b""), side, f"{row.file}: row {row.name}")
