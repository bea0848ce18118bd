"""fewlines: autoregressive image generation with a key-value cache of a few lines of tokens.

>>> model = fewlines.load_model("results/fashion-mnist/base/model.safetensors")
>>> codes = fewlines.generate(model, labels=[0, 1, 2], cache=fewlines.cache("lines", lines=3))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache
from fewlines.cache.spec import make_cache as cache
from fewlines.decode.loop import generate
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.models import checkpoint
from fewlines.models.base import Model
from fewlines.models.tokenizer import Tokenizer

__all__ = [
    "Cache",
    "FewlinesError",
    "Model",
    "Sampler",
    "Schedule",
    "Tokenizer",
    "cache",
    "generate",
    "load_model",
    "load_schedule",
    "load_tokenizer",
]


def load_model(path: str | Path, **how: Any) -> Model:
    """Load a model that `fewlines train-model` wrote, or one that LlamaGen published.

    Args:
        path: of the file.
        how: what a published file may not say: `side`, tokens of a side of its images, `heads` of a
            layer, and `part`, `model` or `ema`.

    Raises:
        FewlinesError: there is no such file, or it holds no model.
    """
    return checkpoint.load_model(Path(path), **how)


def load_schedule(path: str | Path) -> Schedule:
    """Load a cache's schedule that `fewlines export-schedule` wrote; `generate` takes it as a
    cache.

    Args:
        path: of the safetensors file.

    Raises:
        FewlinesError: there is no such file, or it holds no schedule.
    """
    return Schedule.load(Path(path))


def load_tokenizer(path: str | Path, part: str | None = None) -> Tokenizer:
    """Load a tokenizer that `fewlines train-tokenizer` wrote, or one that LlamaGen published.

    Args:
        path: of the file.
        part: `model` or `ema`, where a published file holds both; None takes the first and says so.

    Raises:
        FewlinesError: there is no such file, or it holds no tokenizer.
    """
    return checkpoint.load_tokenizer(Path(path), part)
