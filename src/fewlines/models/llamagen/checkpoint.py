"""Published checkpoints of LlamaGen (arXiv 2406.06525), as its scripts write them."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewlines.errors import FewlinesError, look_up
from fewlines.files import parse, read_tensors
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import SHAPES, TransformerShape

Network = TypeVar("Network", bound=nn.Module)

WANTED = "a whole file of weights alone; save a state_dict as safetensors and name that"
PARTS = ("model", "ema")  # a file may hold both
WEIGHTS = (*PARTS, "module", "state_dict")  # under one of these, or at the top
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, torch.compile
# Tables and buffers that older files hold, and that are computed here.
COMPUTED = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\.[kv]_cache")
IMAGENET = 1000
NOTHING = "cls_embedding.uncond_embedding"  # of models that draw from captions
ROWS = "cls_embedding.embedding_table.weight"


def read_weights(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: of a `.pt` or `.safetensors` file.
        part: `model` or `ema`, where it holds both; None takes the first, and says so.

    Returns:
        Weights by their published names, and what its training script was given, if it says.

    Raises:
        FewlinesError: no such file, one that holds code or other things than weights, or no such
            part.
    """
    if path.suffix == ".safetensors":
        return _rename(read_tensors(path)[0]), {}
    load = partial(torch.load, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals([Namespace]):
        content = parse(path, load, WANTED)
    held = content if isinstance(content, dict) else {}
    given = held.get("args")
    parts = [name for name in WEIGHTS if isinstance(held.get(name), dict)]
    if part is not None and part not in parts:
        raise FewlinesError(f"{path} holds no '{part}'; it holds {', '.join(parts) or 'one model'}")
    if part is None and set(PARTS) <= set(parts):
        said = f"{path} holds 'model' and 'ema'; 'model' is read, part: ema reads the other"
        print(said, file=sys.stderr)
    if parts:
        content = held[part or parts[0]]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise FewlinesError(f"{path} holds no weights by name")
    return _rename(content), vars(given) if isinstance(given, Namespace) else {}


def _rename(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {WRAPPERS.sub("", str(name)): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in named.items() if not COMPUTED.fullmatch(name)}


def fill(network: Network, found: Mapping[str, Tensor], path: Path) -> Network:
    """Give a network its weights, all of them and no others.

    Args:
        network: may lie on the meta device.
        found: weights by name.
        path: of the file, for the sentence.

    Raises:
        FewlinesError: one is missing, too many, of another shape or not finite.
    """
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for names, what in ((missing, "lacks"), (extra, "has, beside the model's weights,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FewlinesError(f"{path} {what} {names[0]}{more}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise FewlinesError(
                f"{path}: {name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}; of "
                "another shape"
            )
        if not found[name].isfinite().all():
            raise FewlinesError(f"{path}: {name} is not finite everywhere")
    network.load_state_dict({name: each.float() for name, each in found.items()}, assign=True)
    return network.eval().requires_grad_(False)


def load_checkpoint(
    path: Path,
    shape: str | None = None,
    side: int | None = None,
    heads: int | None = None,
    part: str | None = None,
) -> Transformer:
    """Load the model in a file, whose tensors say what it is.

    Args:
        path: of a `.pt` or `.safetensors` file.
        shape: published shape that it must have; None finds it.
        side: tokens of a side of its images; None goes by what the file says of its training, or by
            the published shape.
        heads: query heads of a layer, where it has no published shape: tensors do not tell.
        part: `model` or `ema`, where it holds both.

    Raises:
        FewlinesError: see `read_weights` and `fill`; or it is of another shape than was named.
    """
    if shape is not None:
        look_up(shape, SHAPES, "shape")
    found, given = read_weights(path, part)
    condition = NOTHING if NOTHING in found else ROWS
    tables = {name for name, tensor in found.items() if tensor.ndim == 2}
    lacking = {"tok_embeddings.weight", condition} - tables
    if lacking:
        raise FewlinesError(f"{path} lacks {min(lacking)}: no model of LlamaGen's")
    codes, dim = found["tok_embeddings.weight"].shape
    layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
    name = shape or _find_shape(given, dim, layers)
    published = SHAPES[name] if name else None
    if published and (published.dim, published.layers) != (dim, layers):
        raise FewlinesError(
            f"{path}: {name} has {published.layers} layers of width {published.dim}, the file "
            f"{layers} of {dim}"
        )
    heads = heads or (published.heads if published else None)
    if heads is None:
        raise FewlinesError(
            f"{path}: {layers} layers of width {dim} are of no published shape, and tensors do not "
            "tell heads apart; say how many heads a layer has"
        )
    captioned = condition == NOTHING
    classes, has_null = (1, True) if captioned else _count_classes(path, found, given)
    length, features = found[NOTHING].shape if captioned else (1, 0)
    first = next((found[n] for n in sorted(tables) if n.endswith("wqkv.weight")), None)
    inner = next((found[n] for n in sorted(tables) if n.endswith("feed_forward.w1.weight")), None)
    if first is None or inner is None or dim % heads:
        raise FewlinesError(f"{path}: no layers of a transformer with {heads} heads")
    made = TransformerShape(
        dim,
        layers,
        heads,
        (len(first) - dim) * heads // (2 * dim),
        codes,
        classes,
        _find_grid(path, given, side, published.grid if published else None),
        prefix=length,
        has_null_class=has_null,
        caption_dim=features,
    )
    if made.hidden != len(inner):
        made = replace(made, multiple_of=len(inner))
    with torch.device("meta"):
        model = Transformer(made)
    if not has_null:
        found[ROWS] = torch.cat([found[ROWS], torch.zeros(1, dim).to(found[ROWS])])
    return fill(model, found, path)


def _find_shape(given: Mapping[str, Any], dim: int, layers: int) -> str | None:
    """The published shape that a training script was told, or that has these sizes."""
    told = str(given.get("gpt_model", "")).lower().replace("gpt-", "llamagen-")
    if told in SHAPES:
        return told
    own = {name: each for name, each in SHAPES.items() if name.startswith("llamagen")}
    return next((name for name, x in own.items() if (x.dim, x.layers) == (dim, layers)), None)


def _count_classes(
    path: Path, found: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[int, bool]:
    """Classes, and whether a row more stands for none: without class dropout there is no such
    row."""
    rows, classes = len(found[ROWS]), given.get("num_classes")
    if isinstance(classes, int):
        if rows - classes not in (0, 1):
            raise FewlinesError(f"{path}: {rows} rows of class embeddings for {classes} classes")
        return classes, rows > classes
    if rows == IMAGENET:
        print(
            f"{path}: {rows} rows of class embeddings are read as so many classes, and none for "
            "'no class': the model cannot be guided",
            file=sys.stderr,
        )
        return rows, False
    return rows - 1, True


def _find_grid(
    path: Path, given: Mapping[str, Any], side: int | None, usual: tuple[int, int] | None
) -> tuple[int, int]:
    """Tokens of an image: weights do not tell."""
    pixels, stride = given.get("image_size"), given.get("downsample_size", 16)
    if isinstance(pixels, int) and isinstance(stride, int) and pixels >= stride > 0:
        trained = pixels // stride
        if side not in (None, trained):
            raise FewlinesError(
                f"{path} was trained on images of {trained}×{trained} tokens, not {side}×{side}"
            )
        return trained, trained
    if side is not None:
        return side, side
    if usual is None:
        raise FewlinesError(
            f"{path} does not say how many tokens its images have; say how many a side has"
        )
    print(
        f"{path} does not say how many tokens its images have: {usual[0]}×{usual[1]} are taken",
        file=sys.stderr,
    )
    return usual
