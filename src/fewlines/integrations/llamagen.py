"""Published checkpoints of LlamaGen (arXiv 2406.06525), and codes that its scripts extract."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewlines.errors import FewlinesError
from fewlines.files import read_tensors
from fewlines.models.transformer import Transformer, TransformerShape

WEIGHTS = ("model", "module", "state_dict", "ema")  # under one of these, or at the top


def load_checkpoint(path: Path, shape: TransformerShape) -> Transformer:
    """The model in a `.pt` or `.safetensors` file.

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
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise FewlinesError(
            f"{path} is damaged or holds more than weights ({str(error).splitlines()[0]}); "
            "save its state_dict as safetensors and name that"
        ) from None
    for name in WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise FewlinesError(f"{path} holds no weights by name")
    return content


def read_codes(codes: Path, labels: Path, shape: TransformerShape) -> tuple[Tensor, Tensor]:
    """Codes `(n, N)` int32 and classes `(n,)` of `.npy` files, checked against a model's shape."""
    try:
        images, classes = (np.load(path, allow_pickle=False) for path in (codes, labels))
    except (OSError, ValueError) as error:
        raise FewlinesError(f"{codes}, {labels}: not both .npy files ({error})") from None
    images, n = images.reshape(len(images), -1), shape.geometry.n_tokens
    if images.shape[1] != n or classes.shape != (len(images),):
        raise FewlinesError(
            f"{codes} has {images.shape[1]} codes an image and {labels} the shape {classes.shape}; "
            f"wanted are {n} codes and a class for each of the {len(images)} images"
        )
    for values, limit, path in ((images, shape.codes, codes), (classes, shape.classes, labels)):
        if not 0 <= values.min() <= values.max() < limit:
            raise FewlinesError(f"{path}: values must lie in 0 … {limit - 1}")
    return torch.from_numpy(images.astype(np.int32)), torch.from_numpy(classes.astype(np.int64))
