"""Images of a model at once: from its weights to a picture."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.utils import make_grid

from fewlines import machine
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache, make_cache, parse_cache
from fewlines.calibration.capture import capture_expected
from fewlines.decode.inputs import read_conditions
from fewlines.decode.loop import generate
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.files import replacing
from fewlines.metrics.head_losses import add_losses
from fewlines.models.base import AttentionModel, Model
from fewlines.models.checkpoint import load_model, load_tokenizer
from fewlines.progress import progress
from fewlines.schema import Precision
from fewlines.stages.models import HEADS, SIDE
from fewlines.stages.tokens import load_numbers

GUIDANCE = 4.0  # as LlamaGen's own script draws
ROW = 8  # images of a row of the picture, at most


def draw(
    checkpoint: Path,
    tokenizer: Path,
    cache: str,
    output: Path,
    labels: str | None = None,
    captions: list[Path] | None = None,
    calibration: Path | None = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="drawn where none is given")] = 16,
    count: Annotated[int, typer.Option(min=1, help="images of each label")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images decoded together")] = 16,
    guidance: float | None = None,
    guided_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 2000,
    top_p: float = 1.0,
    precision: Precision = "auto",
    side: Annotated[int | None, typer.Option(min=1, help=SIDE)] = None,
    heads: Annotated[int | None, typer.Option(min=1, help=HEADS)] = None,
    part: str | None = None,
) -> None:
    """Draw images under a cache: one picture of them all.

    Args:
        checkpoint: weights of the model, ours or LlamaGen's published ones.
        tokenizer: weights of the tokenizer, ours or LlamaGen's published ones.
        cache: such as full, streaming:4lines or scheduled+merge:4lines; or the file of a schedule.
        output: PNG to write.
        labels: class numbers, such as 207,360.
        captions: T5 features of a caption, in place of labels, (tokens, 2048) in a .npy file as
            LlamaGen's scripts extract them; may be given again.
        calibration: of the model, for caches that go by one; made of images drawn first where not
            given.
        calibration_images: drawn for that.
        count: images of each label.
        seed: of the noise.
        batch: images decoded together.
        guidance: scale of classifier-free guidance; 4 where the model can draw without a class.
        guided_tokens: first tokens of an image that are guided; 0 guides all.
        temperature: divides the logits.
        top_k: keeps so many of the likeliest codes; 0 keeps all.
        top_p: keeps the likeliest codes of this mass.
        precision: of matrix products, float32, bfloat16 or auto.
        side: tokens of a side of its images.
        heads: query heads of a layer.
        part: model or ema, where the checkpoint holds both.
    """
    if (labels is None) == (not captions):
        raise FewlinesError("give --labels, or --captions of a model that draws from captions")
    if labels is not None and not re.fullmatch(r"\d+(,\d+)*", labels):
        raise FewlinesError(f"labels: {labels!r} is not class numbers such as 207,360")
    if output.suffix != ".png":
        raise FewlinesError(
            f"output: {output} is no name of a picture; write one that ends in .png"
        )
    sampler = Sampler(
        temperature, top_k, top_p, 1.0 if guidance is None else guidance, guided_tokens
    )
    limited = _read_cache(cache)
    model = load_model(checkpoint, side=side, heads=heads, part=part)
    pictures = load_tokenizer(tokenizer)
    if pictures.shape.codes != model.spec.codes:
        raise FewlinesError(
            f"{tokenizer} has {pictures.shape.codes} codes, {checkpoint} draws {model.spec.codes}; "
            "they do not belong together"
        )
    if guidance is None and model.has_null_class:
        sampler = replace(sampler, guidance=GUIDANCE)
    if bool(captions) != bool(model.caption_dim):
        raise FewlinesError(
            f"{checkpoint} draws from {'captions' if model.caption_dim else 'classes'}; give "
            f"--{'captions' if model.caption_dim else 'labels'}"
        )
    wanted: Any = [_read_features(path) for path in captions or []]
    wanted = read_conditions(wanted or [int(each) for each in str(labels).split(",")], model)
    model.to(machine.device())
    dtype = machine.resolve_precision(precision)
    if isinstance(limited, Cache) and limited.requires:
        limited = limited.calibrated(calibration)
        if limited.calibration is None:
            limited = _calibrate(limited, model, wanted, calibration_images, batch, sampler, dtype)
    wanted = [each for each in wanted for _ in range(count)]
    bar = progress("draw", len(wanted), "images")
    start = time.perf_counter()
    codes = generate(
        model, wanted, limited, seed,
        batch=batch, sampler=sampler, precision=dtype, storage=dtype, done=bar.update,
    )  # fmt: skip
    seconds = (time.perf_counter() - start) / len(wanted)
    bar.close()
    images = pictures.decode(codes.unflatten(1, model.spec.grid).cpu())
    drawn = labels if labels is not None else [path.name for path in captions or []]
    facts = {"drawn": drawn, "count": count, "cache": limited.slug, "seed": seed}
    facts |= asdict(sampler)
    _write_picture(output, images, count if count > 1 else ROW, json.dumps(facts))
    print(
        f"{output}: {len(wanted)} images, {seconds:.2f} s each; {_say_bytes(model, limited, dtype)}"
    )


def _read_cache(given: str) -> Cache | Schedule:
    return Schedule.load(Path(given)) if given.endswith(".safetensors") else parse_cache(given)


def _read_features(path: Path) -> Any:
    found = load_numbers(path, np.floating, "features (tokens, F)")
    return found[0] if found.ndim == 3 and len(found) == 1 else found


def _calibrate(
    cache: Cache,
    model: Model,
    wanted: Any,
    images: int,
    batch: int,
    sampler: Sampler,
    dtype: torch.dtype,
) -> Cache:
    """The cache, calibrated on images that the model draws of these with everything kept; guided
    ones are seen with and without their condition, as guidance sees them."""
    if not isinstance(model, AttentionModel):
        raise FewlinesError(f"--cache: {model.name} has no key-value cache; write full")
    print(f"{cache.slug}: calibrated on {images} images that are drawn first", file=sys.stderr)
    of = [wanted[number % len(wanted)] for number in range(images)]
    bar = progress("draw for calibration", images, "images")
    codes = generate(
        model, of, make_cache("full"), seed=1,
        batch=batch, sampler=sampler, precision=dtype, done=bar.update,
    )  # fmt: skip
    bar.close()
    parts = []
    for twin, given, numbers in model.group(read_conditions(of, model)):
        assert isinstance(twin, AttentionModel)
        seen, codes_of = given.to(model.device), codes[numbers.to(model.device)]
        if sampler.guided:
            seen, codes_of = torch.cat([seen, twin.blank(seen)]), codes_of.repeat(2, 1)
        bar = progress("calibrate", len(seen) * model.geometry.layers, "layers of images")
        found = capture_expected(twin, seen, codes_of, batch, bar.update)
        bar.close()
        parts.append((found, (twin, seen, codes_of)))
    return replace(cache, calibration=add_losses(cache.requires, parts))


def _write_picture(path: Path, images: Tensor, row: int, facts: str) -> None:
    pixels = make_grid(images, nrow=row, pad_value=255).permute(1, 2, 0).numpy()
    said = PngImagePlugin.PngInfo()
    said.add_text("fewlines", facts)
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png", pnginfo=said)


def _say_bytes(model: Model, cache: Cache | Schedule, dtype: torch.dtype) -> str:
    kept, full = (model.count_bytes(each, 1, dtype) / 1e6 for each in (cache, make_cache("full")))
    return f"{kept:.1f} MB of keys and values a row, where a full cache keeps {full:.1f} MB"
