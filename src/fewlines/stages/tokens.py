"""The file of tokens that the transformer is trained and judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewlines.config import TaskSettings
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors
from fewlines.models.transformer import Transformer, TransformerShape


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


def labels_of(task: TaskSettings, network: Transformer, labels: Tensor) -> Tensor:
    """The classes `(n,)` that a model is told in a task."""
    return labels if task.labelled else torch.full_like(labels, network.null_class)


def given_tokens(task: TaskSettings, network: Transformer) -> int:
    """How many tokens of an image a task starts from; raises if that is all of them."""
    height, width = network.shape.grid
    if task.given >= height:
        raise FewlinesError(f"tasks: {task.given} lines are given of an image of {height}")
    return task.given * width


def _described(grid: tuple[int, ...], codes: int, classes: int) -> str:
    return f"{grid[0]}×{grid[1]} tokens of {codes} codes in {classes} classes"
