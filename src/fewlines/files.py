"""Reading and writing files so that none is ever half-written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewlines.errors import FewlinesError

HEADER = "fewlines"


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
        raise FewlinesError(f"{path} is not valid JSON ({error}); delete it, run again") from None


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
    with replacing(path) as temporary:
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=header)
        temporary.chmod(0o644)  # safetensors makes files that only their owner may read


def read_tensors(
    path: Path, names: Iterable[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file.

    Args:
        path: the file.
        names: of the tensors that are wanted; None reads all of them.

    Returns:
        Its tensors, on the CPU, and its description.

    Raises:
        FewlinesError: there is none, or it is not complete.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            wanted = file.keys() if names is None else names
            tensors = {name: file.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist; run the stage that writes it first") from None
    except (SafetensorError, OSError) as error:
        raise FewlinesError(
            f"{path} is not a complete safetensors file ({error}); delete it and run again"
        ) from None
    return tensors, json.loads(header.get(HEADER, "{}"))


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Digest what tensors hold, to tell whether it is what it was."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(held.numpy().data)
    return found.hexdigest()
