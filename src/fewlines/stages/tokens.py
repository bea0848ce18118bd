"""The file of tokens that the transformer is trained and judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import read_tensors
from fewlines.models.transformer import TransformerShape


def read_tokens(
    path: Path, shape: TransformerShape | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`{train,test}_{codes,labels}`, and the header with `grid`, `codes` and `classes`; raises if
    they are not those of a model's `shape`."""
    tensors, header = read_tensors(path)
    if not {"grid", "codes", "classes"} <= set(header):
        raise FewlinesError(f"{path} is not a file of tokens; 'fewlines tokenize' writes one")
    found = (tuple(header["grid"]), header["codes"], header["classes"])
    if shape is not None and found != (shape.grid, shape.codes, shape.classes):
        wanted = _described(shape.grid, shape.codes, shape.classes)
        raise FewlinesError(
            f"{path} holds {_described(*found)}, but the model was made for {wanted}"
        )
    return tensors, header


def _described(grid: tuple[int, ...], codes: int, classes: int) -> str:
    return f"{grid[0]}×{grid[1]} tokens of {codes} codes in {classes} classes"
