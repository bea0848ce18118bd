"""An image as it is drawn, beside what each head still holds: an animation and a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from fewlines.files import replacing, write_text

Pixels = npt.NDArray[np.uint8]
UNBORN, GONE, HELD, NEWEST = 0, 1, 2, 3
COLOURS = np.array([[24, 26, 32], [70, 74, 86], [255, 196, 61], [255, 255, 255]], np.uint8)
BACKGROUND, INK = (12, 13, 16), (220, 222, 228)
PICTURE = 224  # pixels of a picture's side
MARGIN, TITLE = 16, 22
MILLISECONDS = 120  # a frame


@dataclass(frozen=True)
class Frame:
    """Attributes: `step`, the newest image token; `few` and `full`, the pictures so far,
    `(H, W, 3)`; `held` `(L, heads, h, w)`, of each token whether it is to come, evicted or held."""

    step: int
    few: Pixels
    full: Pixels
    held: Pixels


def find_residents(evicted_at: npt.NDArray[np.int64], step: int, grid: tuple[int, int]) -> Pixels:
    """Find what is held after image token `step` was written, `(…, h, w)`, of `evicted_at` `(…,
    N)`."""
    token = np.arange(evicted_at.shape[-1])
    held = np.where(evicted_at > step, HELD, GONE)
    held = np.where(token > step, UNBORN, held)
    held[..., step] = NEWEST
    return held.reshape(*evicted_at.shape[:-1], *grid).astype(np.uint8)


def write_animation(frames: Sequence[Frame], caption: str, path: Path) -> None:
    """Write a GIF that stays on its last frame for two seconds."""
    pictures = [_compose(frame, caption) for frame in frames]
    times = [MILLISECONDS] * (len(pictures) - 1) + [2000]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=times,
            loop=0,
        )


def write_page(frames: Sequence[Frame], caption: str, path: Path) -> None:
    """Write one HTML file with a slider, pictures inside."""
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        _compose(frame, caption).save(buffer, format="PNG", optimize=True)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewlines", "report"), autoescape=True
    )
    page = environment.get_template("watch.html")
    write_text(path, page.render(caption=caption, frames=encoded))


def _compose(frame: Frame, caption: str) -> Image.Image:
    layers, heads, height, width = frame.held.shape
    cell = max(1, 2 * PICTURE // max(height * layers, width * heads))
    maps = _tiles(COLOURS[frame.held], cell)  # (·, ·, 3)
    total = (
        4 * MARGIN + 2 * PICTURE + max(maps.shape[1], PICTURE),
        2 * TITLE + 2 * MARGIN + max(PICTURE, maps.shape[0]),
    )
    canvas = Image.new("RGB", total, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    left = MARGIN
    for title, pixels in (("few lines", frame.few), ("full cache", frame.full)):
        pen.text((left, MARGIN // 2), title, fill=INK)
        picture = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, TITLE + MARGIN // 2))
        left += PICTURE + MARGIN
    pen.text((left, MARGIN // 2), "held, by layer (down) and head (across)", fill=INK)
    canvas.paste(Image.fromarray(maps), (left, TITLE + MARGIN // 2))
    shares = (frame.held >= HELD).sum((2, 3))
    text = f"{caption}   token {frame.step + 1} of {height * width}, {shares.max()} held at most"
    pen.text((MARGIN, total[1] - TITLE), text, fill=INK)
    return canvas


def _tiles(maps: Pixels, cell: int) -> Pixels:
    """Maps `(L, heads, h, w, 3)` side by side, a gap of one cell between them."""
    padded = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=BACKGROUND[0])
    rows = padded.transpose(0, 2, 1, 3, 4)
    layers, height, heads, width, _ = rows.shape
    sheet = rows.reshape(layers * height, heads * width, 3)
    return sheet.repeat(cell, 0).repeat(cell, 1)
