"""Images that are read one after another, into files larger than memory."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewlines.cli import main
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError
from fewlines.files import filling_tensors, read_tensors, write_tensors
from fewlines.models.checkpoint import save_network
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape


def picture(number: int) -> bytes:
    """A PNG of one colour that tells its number."""
    content = io.BytesIO()
    Image.new("RGB", (20, 16), (number, number // 2, 7)).save(content, "PNG")
    return content.getvalue()


def pack(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))


def labelled(numbers: range) -> dict[str, bytes]:
    of_each = ({f"{n:04}.png": picture(n), f"{n:04}.cls": b"%d\n" % (n % 3)} for n in numbers)
    return {name: content for each in of_each for name, content in each.items()}


@pytest.fixture
def archives(tmp_path):
    pack(tmp_path / "tars/train-0.tar", labelled(range(40)))
    pack(tmp_path / "tars/train-1.tar", labelled(range(40, 60)))
    return tmp_path / "tars"


def seen(split) -> dict[int, int]:
    """Class numbers by the number that each picture tells."""
    numbers = split.images[:, 0, 3, 3].tolist()
    return dict(zip(numbers, split.labels.tolist(), strict=True))


def test_archives_are_read_with_their_classes(archives):
    data = SOURCES["webdataset"](archives, 8)
    assert list(data.classes) == ["0", "1", "2"]
    assert data.train.images.shape[1:] == (3, 8, 8)
    train, test = seen(data.train), seen(data.test)
    assert train | test == {number: number % 3 for number in range(60)}
    assert not train.keys() & test.keys()
    assert 2 <= len(test) <= 15


def test_archives_of_a_test_set_are_it(archives):
    pack(archives / "val-0.tar", labelled(range(60, 70)))
    data = SOURCES["webdataset"](archives, 8)
    assert seen(data.train).keys() == {*range(60)}
    assert seen(data.test).keys() == {*range(60, 70)}


def test_pictures_without_classes_are_of_one(archives):
    for archive in archives.iterdir():
        archive.unlink()
    pack(archives / "a.tar", {f"{n}.png": picture(n) for n in range(30)})
    data = SOURCES["webdataset"](archives, 8)
    assert list(data.classes) == ["0"]
    assert len(data.train) + len(data.test) == 30


def test_archives_that_cannot_be_used_are_explained(archives, tmp_path):
    load = SOURCES["webdataset"]
    with pytest.raises(FewlinesError, match="'webdataset' needs the folder"):
        load(None)
    with pytest.raises(FewlinesError, match=r"is no folder of \.tar files"):
        load(tmp_path)
    for members, message in (
        ({"a.png": picture(1), "a.cls": b"0", "b.png": picture(2)}, "'b' has not both"),
        ({"a.png": picture(1), "a.cls": b"cat"}, "is no whole archive of pictures"),
        ({"a.png": picture(1), "a.cls": b"-1"}, "classes are numbers from 0"),
    ):
        pack(archives / "train-2.tar", members)
        with pytest.raises(FewlinesError, match=message):
            load(archives)
    pack(archives / "train-2.tar", {"a.png": picture(1)})
    with pytest.raises(FewlinesError, match=r"-1\.tar has classes and .*-2\.tar has none"):
        load(archives)
    pack(archives / "train-2.tar", {"a.png": b"no picture", "a.cls": b"0"})
    with pytest.raises(FewlinesError, match=r"train-2\.tar: a\.png cannot be read as an image"):
        _ = load(archives, 8).train.images
    (archives / "train-2.tar").write_bytes((archives / "train-1.tar").read_bytes()[:3000])
    with pytest.raises(FewlinesError, match=r"train-2\.tar is no whole archive"):
        load(archives)


def test_a_stream_is_saved_as_if_it_had_been_held(archives, tmp_path):
    data = SOURCES["webdataset"](archives, 8)
    data.save(tmp_path / "streamed")
    held = {
        f"{name}_{part}": getattr(split, part)
        for name, split in (("train", data.train), ("test", data.test))
        for part in ("images", "labels")
    }
    header = {"classes": list(data.classes), "origins": []}
    write_tensors(tmp_path / "held", held, header)
    (streamed, header), (wanted, same) = (read_tensors(tmp_path / x) for x in ("streamed", "held"))
    assert header == same
    assert streamed.keys() == wanted.keys()
    assert all(torch.equal(streamed[name], wanted[name]) for name in wanted)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_was_not_filled_is_not_there(tmp_path):
    def fill() -> None:
        with filling_tensors(tmp_path / "x", {"a": (3, 2), "b": (0,)}, {"a": "U8", "b": "I64"}, {}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_parts_of_the_tokens_are_those_of_all_at_once(tmp_path, shards):
    """Seven parts of three batches: some are empty."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (600, 1, 8, 8), generator=generator, dtype=torch.uint8)
    content = {"train_images": images, "train_labels": torch.arange(600) % 3}
    content |= {"test_images": images[:90].clone(), "test_labels": torch.arange(90) % 3}
    write_tensors(tmp_path / "images", content, {"classes": ["a", "b", "c"]})
    torch.manual_seed(0)
    save_network(tmp_path / "tokenizer", ConvTokenizer(TokenizerShape(1, (4, 8), 0, 16, 4)))
    given = ["tokenize", f"--images={tmp_path / 'images'}", f"--tokenizer={tmp_path / 'tokenizer'}"]
    assert main([*given, f"--output={tmp_path / 'whole'}"]) == 0
    for shard in range(shards):
        part = [f"--shard={shard}", f"--shards={shards}", f"--output={tmp_path / str(shard)}"]
        assert main([*given, *part]) == 0
    parts = [f"--shard={tmp_path / str(shard)}" for shard in range(shards)]
    assert main(["gather", *parts, f"--output={tmp_path / 'gathered'}"]) == 0
    assert (tmp_path / "gathered").read_bytes() == (tmp_path / "whole").read_bytes()
    assert main([*given, f"--shards={shards}", f"--shard={shards}", "--output=o"]) == 2


def test_a_folder_is_a_stream(tmp_path):
    for number in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.png").write_bytes(picture(number))
    data = SOURCES["folder"](tmp_path, 8)
    data.save(tmp_path / "images.safetensors")
    loaded = ImageData.load(tmp_path / "images.safetensors")
    assert torch.equal(loaded.train.images, data.train.images)
    assert np.array_equal(loaded.test.labels, data.test.labels)
