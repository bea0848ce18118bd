"""Reading and writing files so that none is ever half-written."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewlines.errors import FewlinesError

HEADER = "fewlines"
KINDS = {"U8": np.uint8, "I64": np.int64}  # numbers, as safetensors names them
LARGE = 2**30  # bytes of a folder that are not read to see whether they changed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a reader can read, under a temporary name, then rename it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FewlinesError: there is none, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist; run the stage that writes it first") from None
    except ValueError as error:
        raise FewlinesError(f"{path} is not valid JSON ({error})") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV to six digits, under a temporary name, then rename it."""
    import pandas as pd  # here: most processes write no table, and importing it takes a while

    write_text(path, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        path: its name.
        tensors: what it holds.
        metadata: a JSON-like description.
    """
    # One entry: safetensors writes several in an order that changes from run to run.
    header = {HEADER: json.dumps(metadata or {})}
    _require_utf8(path)
    with replacing(path) as temporary:
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=header)
        temporary.chmod(0o644)  # safetensors makes files that only their owner may read


@contextmanager
def filling_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], metadata: Any
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Give arrays on disk to be filled: a safetensors file that need not fit into memory, complete
    under its name when the block ends well.

    Args:
        path: its name.
        shapes: of its tensors.
        dtypes: of its tensors, as safetensors writes them.
        metadata: a JSON-like description.
    """
    _require_utf8(path)
    header: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(metadata)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(KINDS[dtypes[name]]).itemsize
        header[name] = {"dtype": dtypes[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin where every number may
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a run that was killed
        left.unlink(missing_ok=True)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a signal later
                file.flush()
                os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        yield {
            name: np.memmap(
                temporary,
                KINDS[dtypes[name]],
                mode="r+",
                offset=8 + len(text) + header[name]["data_offsets"][0],
                shape=shape,
            )
            if math.prod(shape)
            else np.empty(shape, KINDS[dtypes[name]])
            for name, shape in shapes.items()
        }


def _require_utf8(path: Path) -> None:
    """Refuse the name of a safetensors file in another encoding: its library knows no others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise FewlinesError(f"{str(path)!a} is no name in UTF-8; rename it") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a safetensors file: a handle on its tensors, and its description.

    Raises:
        FewlinesError: there is none, or it is not complete, or it says nothing that can be read.
    """
    _require_utf8(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            if not isinstance(header, dict):
                raise ValueError(f"its description is {header!r}")
            yield file, header
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist; run the stage that writes it first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FewlinesError(f"{path} is not a complete safetensors file ({error})") from None


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Read the shapes of the tensors in a safetensors file, and its description."""
    with open_tensors(path) as (file, header):
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}, header


def read_tensors(
    path: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        Its tensors, on the CPU, and its description.

    Raises:
        FewlinesError: there is none, or it is not complete.
    """
    with open_tensors(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def parse(path: Path, parser: Callable[[Path], Any], what: str) -> Any:
    """Read a file by another library's parser, which on damaged bytes raises whatever they lead it
    to: numpy a SyntaxError, torch an IndexError.

    Args:
        path: of the file.
        parser: reads it.
        what: it should be, for the sentence.

    Raises:
        FewlinesError: it is not that.
        OSError: it cannot be opened.
    """
    with path.open("rb"):
        pass
    try:
        return parser(path)
    except Exception as error:
        raise FewlinesError(f"{path} is not {what}") from error


def walk_files(folder: Path) -> Iterator[Path]:
    """Find all files that are not hidden, at any depth; links are followed, and a folder that a
    link leads back to is seen once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield Path(place) / name


def digest_folder(folder: Path) -> str:
    """Digest what a folder holds, to tell whether it is what it was: the names and bytes of the
    files that `walk_files` finds, or where they are more than a gigabyte their names, sizes and
    times."""
    files = sorted(file for file in walk_files(folder) if file.is_file())
    large = sum(file.stat().st_size for file in files) > LARGE
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        found.update(os.fsencode(file.relative_to(folder)) + b"\0")
        facts = file.stat()
        found.update(
            f"{facts.st_size} {facts.st_mtime_ns}".encode() if large else file.read_bytes()
        )
    return found.hexdigest()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Digest what tensors hold, to tell whether it is what it was."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(held.numpy().data)
    return found.hexdigest()
