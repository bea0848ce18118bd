"""Networks in safetensors files that say what they are, kind and shape in the header; and files
that others published."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fewlines.errors import FewlinesError
from fewlines.files import read_shapes, read_tensors, write_tensors
from fewlines.models.base import Model, get_family, list_families
from fewlines.models.classifier import Classifier
from fewlines.models.llamagen.tokenizer import LlamaGenTokenizer
from fewlines.models.pixels import PixelTokenizer
from fewlines.models.tokenizer import ConvTokenizer, Tokenizer
from fewlines.models.two_level import TwoLevelTokenizer

TOKENIZERS = (ConvTokenizer, TwoLevelTokenizer, PixelTokenizer, LlamaGenTokenizer)
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
PUBLISHED = ("encoder.conv_in.weight", "tok_embeddings.weight")  # in a tokenizer, in a model

Network = TypeVar("Network", bound=nn.Module)


def list_kinds() -> dict[str, Any]:
    """List the classes of networks by the kind that a file's header names."""
    return {
        **{kind.name: kind for kind in TOKENIZERS},
        "classifier": Classifier,
        **list_families(),
    }


def save_network(path: Path, network: nn.Module) -> None:
    """Write a network, with its kind and shape, as safetensors."""
    (kind,) = (kind for kind, cls in list_kinds().items() if type(network) is cls)
    header = {"kind": kind, "shape": asdict(network.shape)}  # type: ignore[call-overload]
    write_tensors(path, network.state_dict(), header)


def load_network(path: Path, wanted: type[Network]) -> Network:
    """Load the network in a file, ready for use.

    Args:
        path: the file.
        wanted: its class, or `Model` for any family.

    Raises:
        FewlinesError: no such file, not a complete one, another kind of network, weights that do
            not fit the shape that the header states, or numbers that are not finite.
    """
    tensors, header = read_tensors(path)
    cls, shape = _read_kind(path, header)
    if not issubclass(cls, wanted):
        raise FewlinesError(f"{path} holds a {header['kind']}, not a {wanted.__name__.lower()}")
    try:
        network = cls(shape)
    except FewlinesError as error:
        raise FewlinesError(f"{path}: {error}") from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise FewlinesError(f"{path}: weights of another architecture ({first})") from None
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise FewlinesError(
            f"{path}: {broken[0]} is not finite everywhere: a training that diverged; lower its "
            "rates and run again"
        )
    assert isinstance(network, wanted)
    return network.eval().requires_grad_(False)


def load_model(path: Path, **how: Any) -> Model:
    """Load a model of ours, or of LlamaGen's published files.

    Args:
        path: the file.
        how: what a published file does not say, see `Model.read_checkpoint`.

    Raises:
        FewlinesError: no such file, or no model in it.
    """
    if _is_published(path):
        return get_family("llamagen").read_checkpoint(path, **how)
    given = ", ".join(name for name, value in how.items() if value is not None)
    if given:
        raise FewlinesError(f"{path} is a model of ours, which says what it is; leave out {given}")
    return load_network(path, Model)


def load_tokenizer(path: Path, part: str | None = None) -> Tokenizer:
    """Load a tokenizer of ours, or of LlamaGen's published files.

    Args:
        path: of the file.
        part: `model` or `ema`, where a published file holds both.

    Raises:
        FewlinesError: no such file, or no tokenizer in it.
    """
    if _is_published(path):
        return LlamaGenTokenizer.read_checkpoint(path, part)
    if part is not None:
        raise FewlinesError(
            f"{path} is a tokenizer of ours, without parts; leave out part={part!r}"
        )
    return load_network(path, Tokenizer)


def _is_published(path: Path) -> bool:
    """Whether a file is of others: ours say what they are."""
    if path.suffix in PICKLED:
        return True
    names, header = read_shapes(path)
    return "kind" not in header and bool({*PUBLISHED} & {*names})


def load_shape(path: Path) -> tuple[Any, Any]:
    """Load the class and the shape of the network in a file, without its weights; of those that
    others published, a tokenizer's.

    Raises:
        FewlinesError: as `load_network` does.
    """
    if _is_published(path):
        return LlamaGenTokenizer, LlamaGenTokenizer.read_shape(path)
    _, header = read_shapes(path)
    return _read_kind(path, header)


def _read_kind(path: Path, header: dict[str, Any]) -> tuple[Any, Any]:
    """The class of a network, and its shape, by its file's header."""
    kind, kinds = header.get("kind"), list_kinds()
    if not isinstance(kind, str) or kind not in kinds:
        raise FewlinesError(f"{path} does not say what network it holds: not a file of fewlines")
    try:
        return kinds[kind], _make_shape(kinds[kind], header["shape"])
    except FewlinesError as error:
        raise FewlinesError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise FewlinesError(
            f"{path} does not say which {kind} it holds: not a file of this version of fewlines"
        ) from None


def _make_shape(cls: Any, content: Any) -> Any:
    """A shape from JSON, whose lists are tuples here."""
    if not isinstance(content, dict):
        raise TypeError(content)
    return cls.Shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
