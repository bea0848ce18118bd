"""Small archives of emoji sets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path


def write_set(folder: Path, style: str, icons: dict, chars: dict, categories: dict) -> None:
    """An archive of Iconify's layout."""
    content = {
        "icons": {"width": 10, "height": 10, "icons": icons},
        "chars": chars,
        "metadata": {"categories": categories},
    }
    with tarfile.open(folder / f"iconify-json-{style}-1.2.3.tgz", "w:gz") as archive:
        for name, part in content.items():
            raw = json.dumps(part).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def draw_square(colour: str) -> dict:
    """An icon whose left half has a colour."""
    return {"body": f'<rect width="5" height="10" fill="{colour}"/>'}
