"""The file of tokens that the model is trained and judged on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewlines.config import Experiment
from fewlines.config.checks import DataFacts, check_against_data
from fewlines.config.settings import TaskSettings
from fewlines.errors import FewlinesError
from fewlines.files import parse, read_shapes, read_tensors
from fewlines.models.base import Model, TokenSpec
from fewlines.models.checkpoint import load_shape
from fewlines.models.tokenizer import Tokenizer

Integers = npt.NDArray[np.integer[Any]]


def check_data(experiment: Experiment, path: Path) -> None:
    """Check all settings against a file of images or tokens, of which only the header is read.

    Args:
        experiment: with all its sections.
        path: the file.

    Raises:
        FewlinesError: it is no such file, or not enough for the settings.
    """
    shapes, header = read_shapes(path)
    if {"train_images", "test_images"} <= set(shapes):
        height, width = shapes["train_images"][2:]
        weights = experiment.tokenizer.weights
        stride = (_load_tokenizer_shape(weights) if weights else experiment.tokenizer).stride
        train, test = shapes["train_images"][0], shapes["test_images"][0]
        side, grid = (height, width), (height // stride, width // stride)
        facts = DataFacts(train, test, side, grid)
    elif {"train_codes", "test_codes"} <= set(shapes) and "grid" in header:
        train, test = shapes["train_codes"][0], shapes["test_codes"][0]
        facts = DataFacts(train, test, None, read_spec(path, header).grid)
    else:
        return  # another file: whoever reads it says so
    try:
        check_against_data(experiment, facts)
    except FewlinesError as error:
        raise FewlinesError(f"{path}: {error}") from None


def _load_tokenizer_shape(path: Path) -> Any:
    cls, shape = load_shape(path)
    if not issubclass(cls, Tokenizer):
        raise FewlinesError(f"tokenizer.weights: {path} holds a {cls.name}, not a tokenizer")
    return shape


def read_spec(path: Path, header: dict[str, Any]) -> TokenSpec:
    """Read what the tokens in a file are from its header.

    Raises:
        FewlinesError: it does not say.
    """
    try:
        height, width = header["grid"]
        return TokenSpec((int(height), int(width)), int(header["codes"]), int(header["classes"]))
    except (KeyError, TypeError, ValueError):
        raise FewlinesError(
            f"{path} is not a file of tokens; 'fewlines tokenize' writes one"
        ) from None


def read_tokens(
    path: Path, spec: TokenSpec | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of tokens.

    Args:
        path: the file.
        spec: of the model that they are for; None takes any.

    Returns:
        `{train,test}_{codes,labels}`, and the header with `grid`, `codes` and `classes`.

    Raises:
        FewlinesError: it is no such file, or not for this model.
    """
    tensors, header = read_tensors(path)
    found = read_spec(path, header)
    missing = {f"{part}_{kind}" for part in ("train", "test") for kind in ("codes", "labels")}
    missing -= set(tensors)
    if missing:
        raise FewlinesError(f"{path} is not a file of tokens: it lacks {min(missing)}")
    for name, limit in (("codes", found.codes), ("labels", found.classes)):
        for part in ("train", "test"):
            _check_range(tensors[f"{part}_{name}"], limit, f"{path}: {name}")
    if spec is not None and found != spec:
        raise FewlinesError(f"{path} holds {found}, but the model was made for {spec}")
    return tensors, header


def read_codes(
    codes: Path, labels: Path, spec: TokenSpec, crop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read codes `(n, N)` int32 and classes `(n,)`, as LlamaGen's scripts extract them.

    Args:
        codes: a `.npy` file `(n, N)` or `(n, crops, N)`, or a folder with one `(1, crops, N)` for
            each image.
        labels: another file `(n,)`, or a folder with a file of one number for each image.
        spec: of the model that they are for.
        crop: which crop of every image; None takes them in turn, image by image.

    Raises:
        FewlinesError: a file is no such array, or the arrays are not for this model.
    """
    found = [_choose_crop(array, i, crop, path) for i, (path, array) in enumerate(_list(codes))]
    read = [array for _, array in _list(labels)]
    if codes.is_dir() and labels.is_dir():
        _check_names(codes, labels)
    images, classes = np.concatenate(found), np.concatenate([each.reshape(-1) for each in read])
    n = spec.n_tokens
    if images.shape[1] != n or classes.shape != (len(images),):
        raise FewlinesError(
            f"{codes} has {images.shape[1]} codes an image and {labels} the shape {classes.shape}; "
            f"wanted are {n} codes and a class for each of the {len(images)} images"
        )
    for values, limit, path in ((images, spec.codes, codes), (classes, spec.classes, labels)):
        _check_range(values, limit, f"{path}: values")
    return torch.from_numpy(images.astype(np.int32)), torch.from_numpy(classes.astype(np.int64))


def _list(path: Path) -> Iterator[tuple[Path, Integers]]:
    """The array of a file, or those of a folder in the order of their numbers."""
    for each in _name_files(path) if path.is_dir() else [path]:
        yield each, load_numbers(each, np.integer, "whole numbers")


def _name_files(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("*.npy") if file.stem.isdecimal()]
    if not files:
        raise FewlinesError(f"{folder} has no files such as 0.npy, one for each image")
    return sorted(files, key=lambda file: int(file.stem))


def _check_names(codes: Path, labels: Path) -> None:
    ours, theirs = ({file.stem for file in _name_files(each)} for each in (codes, labels))
    if ours != theirs:
        odd = min(ours ^ theirs, key=int)
        raise FewlinesError(f"{odd}.npy is in one of {codes} and {labels}, and not in the other")


def _choose_crop(array: Integers, first: int, crop: int | None, path: Path) -> Integers:
    """`(n, N)` of `(n, N)` or `(n, crops, N)`; `first` is the number of its first image."""
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3:
        raise FewlinesError(
            f"{path}: of shape {array.shape}; wanted is (images, tokens) or (images, crops, tokens)"
        )
    crops = array.shape[1]
    if crop is not None and crop >= crops:
        raise FewlinesError(f"--crop {crop}: {path} has {crops} crops of an image, from 0")
    number = np.arange(len(array))
    chosen: Integers = array[number, (number + first) % crops if crop is None else crop]
    return chosen


def _check_range(values: Any, limit: int, name: str) -> None:
    """Refuse a tensor or an array with whole numbers outside 0 … `limit` − 1."""
    if len(values) and not 0 <= values.min() <= values.max() < limit:
        raise FewlinesError(f"{name} must lie in 0 … {limit - 1}")


def load_numbers(path: Path, kind: type[np.number[Any]], wanted: str) -> npt.NDArray[Any]:
    """Load the one array of a `.npy` file.

    Args:
        path: the file.
        kind: of numbers that it must hold.
        wanted: them in words, for the sentence.

    Raises:
        FewlinesError: it holds another thing, or nothing.
    """
    array = parse(path, np.load, "a .npy file of numbers")
    if not isinstance(array, np.ndarray):
        raise FewlinesError(f"{path} holds several arrays; save one with numpy.save")
    if not np.issubdtype(array.dtype, kind) or array.ndim == 0 or array.size == 0:
        raise FewlinesError(
            f"{path} holds {array.dtype} of shape {array.shape}; wanted are {wanted}"
        )
    return array


def choose_labels(task: TaskSettings, model: Model, labels: Tensor) -> Tensor:
    """Choose the classes `(n,)` that a model is told in a task.

    Raises:
        FewlinesError: none, of a model that never learned to draw without.
    """
    if not (task.labelled or model.has_null_class):
        raise FewlinesError("tasks: this model never learned to draw without a class")
    return labels if task.labelled else torch.full_like(labels, model.null_class)


def count_prompt(task: TaskSettings, model: Model) -> int:
    """Count the tokens of an image that a task starts from.

    Raises:
        FewlinesError: that is all of them.
    """
    height, width = model.spec.grid
    if task.prompt_lines >= height:
        raise FewlinesError(f"tasks: {task.prompt_lines} prompt lines of an image of {height}")
    return task.prompt_lines * width
