"""Emoji sets, read from small archives in Iconify's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewlines.data import SOURCES
from fewlines.data.emoji import SETS, Icon, group_by_thing, is_held_out
from fewlines.errors import FewlinesError
from toy_emoji import draw_square, write_set

COLOURS = ["red", "green", "blue", "gold", "pink", "teal", "navy", "lime", "gray", "cyan"]
THINGS = [f"thing{number}" for number in range(40)]


@pytest.fixture
def sets(tmp_path) -> Path:
    """Two styles of forty things, one of which has skin tones, and one that nobody classes."""
    for style, shift in (("noto", 0), ("fxemoji", 1)):
        icons = {
            name: draw_square(COLOURS[(i + shift) % len(COLOURS)]) for i, name in enumerate(THINGS)
        }
        icons |= {
            "thing3-dark-skin-tone": draw_square("brown"),
            "nobody-knows": draw_square("black"),
        }
        icons["wide"] = {**draw_square("red"), "width": 20}
        half = {"Objects": [*THINGS[:20], "wide"], "Flags": [*THINGS[20:], "thing3-dark-skin-tone"]}
        write_set(tmp_path, style, icons, {}, half if style == "noto" else {"Stuff": THINGS})
    return tmp_path


def test_things_are_on_one_side_whatever_their_style(sets):
    data = SOURCES["emoji"](sets, 8)
    assert data.classes == ["Flags", "Objects"]
    assert data.origins == [SETS["noto"], SETS["fxemoji"]]
    assert len(data.train) + len(data.test) == 2 * (len(THINGS) + 1)
    held = sum(is_held_out(name) for name in [*THINGS, "wide"])
    assert len(data.test) == 2 * held > 0
    by_style = SOURCES["emoji-by-style"](sets, 8)
    assert by_style.classes == ["fxemoji", "noto"]
    assert by_style.test.labels.bincount().tolist() == [held, held]
    both = SOURCES["emoji-by-both"](sets, 8)
    assert both.classes == ["Flags, fxemoji", "Flags, noto", "Objects, fxemoji", "Objects, noto"]
    again = SOURCES["emoji"](sets, 8)
    assert torch.equal(data.train.images, again.train.images)


def test_pictures_are_drawn_on_white_at_any_side(sets):
    for side in (8, 32):
        data = SOURCES["emoji"](sets, side)
        pictures = torch.cat([data.train.images, data.test.images])
        assert pictures.shape[1:] == (3, side, side)
        right = pictures[:, :, :, side // 2 + 1 :]
        assert (right == 255).all(dim=(1, 2, 3)).sum() >= 2 * len(THINGS)
        wide = pictures[(right != 255).any(1).any(1).any(1) == 0]
        assert len(wide)
        assert (pictures[:, :, side // 2, 1] != 255).any(1).all()


def icon(style: str, name: str, character: str = "") -> Icon:
    return Icon(style, name, "", (0, 0, 1, 1), character, "")


@pytest.mark.parametrize(
    "same",
    [
        [
            icon("noto", "man-farmer", "1f468-200d-1f33e"),
            icon("twemoji", "farmer", "1f9d1-200d-1f33e"),
        ],
        [icon("noto", "man-running", "1f3c3-200d-2642-fe0f"), icon("openmoji", "person-running")],
        [icon("noto", "waving-hand", "1f44b"), icon("fluent-emoji", "waving-hand-medium-dark")],
        [icon("noto", "sunglasses", "1f576-fe0f"), icon("fxemoji", "darksunglasses")],
    ],
    ids=lambda same: same[0].name,
)
def test_what_is_of_one_thing_is_known_by_name_or_character(same):
    others = [icon("noto", "sheaf-of-rice", "1f33e"), icon("noto", "dog", "1f415")]
    first, second, rice, dog = group_by_thing([*same, *others])
    assert first == second
    assert len({first, rice, dog}) == 3


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    with pytest.raises(FewlinesError, match="is not a folder"):
        SOURCES["emoji"](tmp_path / "nowhere")
    with pytest.raises(FewlinesError, match=r"has no archives of emoji such as iconify-json-noto"):
        SOURCES["emoji"](tmp_path)
    (tmp_path / "iconify-json-noto-1.0.0.tgz").write_bytes(b"no archive")
    with pytest.raises(FewlinesError, match="is not an archive of an Iconify set"):
        SOURCES["emoji"](tmp_path)
    write_set(tmp_path, "noto", {"a": {"body": "<rect"}}, {}, {"Flags": ["a"]})
    (tmp_path / "iconify-json-noto-1.0.0.tgz").unlink()
    with pytest.raises(FewlinesError, match="too few for a test set"):
        SOURCES["emoji"](tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FewlinesError, match="are fetched by npm, which is not here; install it, or"
    ):
        SOURCES["emoji"]()
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(
        FewlinesError, match=r"the emoji set noto could not be fetched \(no network\)"
    ):
        SOURCES["emoji"]()


def test_every_set_names_its_licence():
    assert len(SETS) == 9
    assert all("CC BY" in of or "Apache" in of or "MIT" in of for of in SETS.values())
