"""fewlines: autoregressive image generation with a key-value cache of a few lines of tokens.

>>> model = fewlines.load_model("results/fashion-mnist/base/model.safetensors")
>>> codes = fewlines.generate(model, labels=[0, 1, 2], cache=fewlines.cache("lines", lines=3))
"""

from __future__ import annotations

from pathlib import Path

from fewlines.cache.placement import Cache, cache
from fewlines.cache.schedule import Schedule
from fewlines.errors import FewlinesError
from fewlines.generate.decode import generate
from fewlines.generate.sampler import Sampler
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.models.transformer import Transformer

__all__ = [
    "Cache",
    "FewlinesError",
    "Sampler",
    "Schedule",
    "Tokenizer",
    "Transformer",
    "cache",
    "generate",
    "load_model",
    "load_schedule",
    "load_tokenizer",
]


def load_model(path: str | Path) -> Transformer:
    """A transformer that `fewlines train-model` wrote."""
    return load_network(Path(path), Transformer)


def load_schedule(path: str | Path) -> Schedule:
    """A cache's schedule that `fewlines export-schedule` wrote; `generate` takes it as a cache."""
    return Schedule.load(Path(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer that `fewlines train-tokenizer` wrote."""
    return load_network(Path(path), Tokenizer)
