"""The file of tokens that the transformer is trained and judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import read_tensors


def read_tokens(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`{train,test}_{codes,labels}`, and the header with `grid`, `codes` and `classes`."""
    tensors, header = read_tensors(path)
    if not {"grid", "codes", "classes"} <= set(header):
        raise FewlinesError(f"{path} is not a file of tokens; 'fewlines tokenize' writes one")
    return tensors, header
