"""Published checkpoints of LlamaGen (arXiv 2406.06525)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import parse, read_tensors
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape

WANTED = "a whole file of weights alone; save a state_dict as safetensors and name that"
WEIGHTS = ("model", "module", "state_dict", "ema")  # under one of these, or at the top


def load_checkpoint(path: Path, shape: TransformerShape) -> Transformer:
    """Load the model in a file.

    Args:
        path: of a `.pt` or `.safetensors` file.
        shape: that its weights must have.

    Raises:
        FewlinesError: no such file, one that holds code or other things than weights, or weights of
            another shape, the first of which is named.
    """
    found = read_tensors(path)[0] if path.suffix == ".safetensors" else _unpickled(path)
    with torch.device("meta"):
        wanted = Transformer(shape).state_dict()
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for names, what in ((missing, "lacks"), (extra, "has, beside the model's weights,")):
        if names:
            raise FewlinesError(f"{path} {what} {names[0]} and {len(names) - 1} more")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise FewlinesError(
                f"{path}: {name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}; "
                "another shape or number of classes"
            )
        if not found[name].isfinite().all():
            raise FewlinesError(f"{path}: {name} is not finite everywhere")
    model = Transformer(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return model.eval().requires_grad_(False)


def _unpickled(path: Path) -> dict[str, Tensor]:
    load = partial(torch.load, map_location="cpu", weights_only=True)
    content = parse(path, load, WANTED)
    for name in WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise FewlinesError(f"{path} holds no weights by name")
    return content
