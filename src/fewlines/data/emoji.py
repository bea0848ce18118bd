"""Open emoji sets: the same things drawn in nine styles, sharp at any side, in nine classes.

The sets are Iconify's packages of SVG pictures, fetched by npm; none of them is redistributed. Left
out are skin tones, of which an emoji has five, and what no set puts into one of Unicode's
categories. The test set is a tenth of the *things*, chosen by their names: all pictures of a thing,
in whatever style and of whatever gender, are on one side.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewlines.data.folder import SIDE
from fewlines.data.images import ImageData, Split
from fewlines.errors import FewlinesError
from fewlines.files import parse
from fewlines.progress import progress

# Sets by style, with licence and author: CC BY and CC BY-SA ask to name them.
SETS = {
    "noto": "Noto Emoji, Google, Apache 2.0",
    "noto-v1": "Noto Emoji (v1), Google, Apache 2.0",
    "fluent-emoji": "Fluent Emoji, Microsoft, MIT",
    "fluent-emoji-flat": "Fluent Emoji Flat, Microsoft, MIT",
    "twemoji": "Twemoji, Twitter, CC BY 4.0",
    "openmoji": "OpenMoji, CC BY-SA 4.0",
    "emojione": "EmojiOne (Colored), CC BY 4.0",
    "emojione-v1": "EmojiOne (v1), CC BY-SA 4.0",
    "fxemoji": "Firefox OS Emoji, Mozilla, Apache 2.0",
}
CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body",
    "Smileys & Emotion", "Symbols", "Travel & Places",
)  # fmt: skip
TEST_SHARE = 10  # one thing in so many
TIMEOUT = 300  # seconds, for one set
TONES = {"light", "medium", "dark", "skin", "tone", "tones"}
GENDERS = {"man", "men", "woman", "women", "person", "people"}
TONE_CODES = range(0x1F3FB, 0x1F400)
FORM_CODES = {0xFE0F, 0x200D, 0x2640, 0x2642}  # in colour, joined, of a gender
PERSON, PERSON_CODES = 0x1F9D1, {0x1F468, 0x1F469}

By = Literal["category", "style", "both"]


@dataclass(frozen=True)
class Icon:
    """A picture of a set: its `body` of SVG, the `box` that it is drawn in, the `character` that it
    stands for where its set says, and its `category`, if it is one of Unicode's."""

    style: str
    name: str
    body: str
    box: tuple[float, float, float, float]
    character: str
    category: str

    @property
    def words(self) -> list[str]:
        """Words of the name."""
        return self.name.split("-")

    def keys(self) -> Iterable[str]:
        """Name the thing that is drawn, in every way that is known: icons that share a key are of
        one thing."""
        bare = [word for word in self.words if word not in TONES | GENDERS]
        yield "".join(bare) or "person"
        codes = [int(code, 16) for code in filter(None, self.character.split("-"))]
        plain = [code for code in codes if code not in TONE_CODES and code not in FORM_CODES]
        plain = [PERSON if code in PERSON_CODES else code for code in plain]
        if plain:
            yield "-".join(f"{code:x}" for code in plain)
        if len(plain) == 1:  # old names have no hyphens, and are Unicode's
            yield re.sub(r"[^a-z0-9]", "", unicodedata.name(chr(plain[0]), "").lower()) or self.name


def load(path: Path | None = None, side: int | None = None, by: By = "category") -> ImageData:
    """Read the sets under `path`, or fetch them.

    Args:
        path: a folder with Iconify's archives, `iconify-json-noto-1.2.9.tgz` and others.
        side: pixels of a side.
        by: what a class is: a category, a style, or both.

    Raises:
        FewlinesError: nothing could be found or fetched, or it holds too few pictures.
    """
    if path is not None:
        return _read(path, side or SIDE, by)
    with tempfile.TemporaryDirectory() as folder:
        _fetch(Path(folder))
        return _read(Path(folder), side or SIDE, by)


SOURCES: dict[str, Callable[[Path | None, int | None], ImageData]] = {
    "emoji": load,
    "emoji-by-style": partial(load, by="style"),
    "emoji-by-both": partial(load, by="both"),
}


def _fetch(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise FewlinesError(
            "emoji are fetched by npm, which is not here; install it, or set data.path to a folder "
            "with the archives iconify-json-noto-….tgz and others of npm's @iconify-json"
        )
    print(f"fetching {len(SETS)} emoji sets by npm:", file=sys.stderr)
    for name, origin in SETS.items():
        print(f"  {origin}", file=sys.stderr)
        command = ["npm", "pack", "--silent", f"@iconify-json/{name}"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT
            )
            said = done.stderr.strip().splitlines() if done.returncode else []
        except subprocess.TimeoutExpired:
            said = [f"no answer in {TIMEOUT} seconds"]
        if said:
            raise FewlinesError(
                f"the emoji set {name} could not be fetched ({said[-1]}); set data.path to a "
                f"folder with its archive iconify-json-{name}-….tgz"
            )


def _read(folder: Path, side: int, by: By) -> ImageData:
    archives = _find_archives(folder)
    icons = [
        icon
        for style, archive in archives
        for icon in parse(archive, partial(_read_set, style), "an archive of an Iconify set")
    ]
    icons = _leave_out_tones(icons)
    things = group_by_thing(icons)
    categories = _find_categories(icons, things)
    kept = [i for i in range(len(icons)) if categories[things[i]]]
    classes, labels = _classify([(categories[things[i]], icons[i].style) for i in kept], by)
    test = torch.tensor([is_held_out(things[i]) for i in kept])
    if not kept or bool(test.all()) or not bool(test.any()):
        raise FewlinesError(f"data.path: {folder} holds {len(kept)} emoji, too few for a test set")
    bar = progress("draw emoji", len(kept), "pictures")
    images = []
    for i in kept:
        images.append(_draw(icons[i], side))
        bar.update()
    bar.close()
    every = torch.stack(images)
    train, held = (Split(every[chosen], labels[chosen]).mixed() for chosen in (~test, test))
    return ImageData(train, held, classes, [SETS[style] for style, _ in archives])


def _find_archives(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise FewlinesError(f"data.path: {folder} is not a folder")
    found = [
        (style, archive)
        for style in SETS
        for archive in sorted(folder.glob(f"iconify-json-{style}-[0-9]*.tgz"), key=_number)[-1:]
    ]
    if not found:
        raise FewlinesError(
            f"data.path: {folder} has no archives of emoji such as iconify-json-noto-1.2.9.tgz"
        )
    return found


def _number(archive: Path) -> list[int]:
    """Give the version in an archive's name."""
    return [int(part) for part in re.findall(r"\d+", archive.stem)]


def _read_set(style: str, archive: Path) -> list[Icon]:
    """Read the icons of a set from its npm archive."""
    with tarfile.open(archive) as held:
        icons, chars, metadata = (
            json.load(_open_member(held, f"package/{name}.json"))
            for name in ("icons", "chars", "metadata")
        )
    size = [icons.get("width", 16), icons.get("height", 16)]
    characters = {name: code for code, name in chars.items()}
    categories = {
        name: category.replace("Animals Nature", "Animals & Nature")
        .replace("Food Drink", "Food & Drink")
        .replace("People Body", "People & Body")
        .replace("Smileys Emotion", "Smileys & Emotion")
        .replace("Travel Places", "Travel & Places")
        for category, names in metadata.get("categories", {}).items()
        for name in names
    }
    return [
        Icon(
            style,
            name,
            icon["body"],
            (
                icon.get("left", 0), icon.get("top", 0),
                icon.get("width", size[0]), icon.get("height", size[1]),
            ),
            characters.get(name, ""),
            categories[name] if categories.get(name) in CATEGORIES else "",
        )
        for name, icon in icons["icons"].items()
    ]  # fmt: skip


def _open_member(held: tarfile.TarFile, name: str) -> Any:
    member = held.extractfile(name)
    if member is None:
        raise KeyError(name)
    return member


def _leave_out_tones(icons: Sequence[Icon]) -> list[Icon]:
    """Leave out skin tones, where their set has the emoji without one."""
    names = {(icon.style, icon.name) for icon in icons}

    def is_tone(icon: Icon) -> bool:
        bare = [word for word in icon.words if word not in TONES]
        return len(bare) < len(icon.words) and (
            "skin" in icon.words or (icon.style, "-".join(bare)) in names
        )

    return [icon for icon in icons if not is_tone(icon)]


def group_by_thing(icons: Sequence[Icon]) -> list[str]:
    """Group icons that share a key, directly or by way of others.

    Returns:
        For each the name of its thing, the least of all keys of it.
    """
    from scipy.cluster.hierarchy import DisjointSet

    keys = [list(icon.keys()) for icon in icons]
    sets = DisjointSet(key for each in keys for key in each)
    for first, *others in keys:
        for other in others:
            sets.merge(first, other)
    things = {key: min(subset) for subset in sets.subsets() for key in subset}
    return [things[first] for first, *_ in keys]


def is_held_out(thing: str) -> bool:
    """Whether a thing is of the test set, by its name alone."""
    digest = hashlib.sha256(thing.encode()).digest()
    return int.from_bytes(digest[:4], "big") % TEST_SHARE == 0


def _find_categories(icons: Sequence[Icon], things: Sequence[str]) -> dict[str, str]:
    """The category that most sets put each thing into; empty where none does."""
    votes: dict[str, Counter[str]] = {thing: Counter() for thing in things}
    for icon, thing in zip(icons, things, strict=True):
        if icon.category:
            votes[thing][icon.category] += 1
    return {
        thing: min(count, key=lambda name: (-count[name], name)) if count else ""
        for thing, count in votes.items()
    }


def _classify(of: Sequence[tuple[str, str]], by: By) -> tuple[list[str], Tensor]:
    names = [
        {"category": category, "style": style, "both": f"{category}, {style}"}[by]
        for category, style in of
    ]
    classes = sorted(set(names))
    return classes, torch.tensor([classes.index(name) for name in names], dtype=torch.long)


def _draw(icon: Icon, side: int) -> Tensor:
    """Pixels `(3, side, side)` uint8 on white."""
    try:
        import resvg_py
    except ImportError:
        raise FewlinesError("emoji are drawn by resvg: pip install 'fewlines[emoji]'") from None
    box = " ".join(f"{number:g}" for number in icon.box)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{icon.body}</svg>'
    )
    try:
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        picture = Image.open(io.BytesIO(drawn)).convert("RGBA")
    except (ValueError, OSError) as error:
        raise FewlinesError(f"{icon.style}: {icon.name} cannot be drawn ({error})") from None
    white = Image.new("RGBA", (side, side), "white")
    placed = ((side - picture.width) // 2, (side - picture.height) // 2)
    white.alpha_composite(picture, placed)
    return torch.from_numpy(np.asarray(white.convert("RGB")).copy()).permute(2, 0, 1)
