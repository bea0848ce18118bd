import gzip
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fewlines.data import SOURCES, ImageData, fashion_mnist
from fewlines.errors import FewlinesError


def test_shapes_are_the_same_every_time_and_survive_a_file(tmp_path):
    data = SOURCES["shapes"](None)
    data.save(tmp_path / "images.safetensors")
    again = ImageData.load(tmp_path / "images.safetensors")
    assert torch.equal(again.train.images, SOURCES["shapes"](None).train.images)
    assert again.test.labels.tolist() == data.test.labels.tolist()
    assert list(again.classes) == list(data.classes)


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(FewlinesError, match="does not exist"):
        fashion_mnist.load(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"some other file"))
    with pytest.raises(FewlinesError, match="checksum differs"):
        fashion_mnist.load(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FewlinesError, match="damaged"):
        fashion_mnist.load(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of 30 pictures in several formats, sizes and modes."""
    for name, colour in (("cats", "red"), ("dogs", "blue")):
        (tmp_path / name / "more").mkdir(parents=True)
        for number in range(30):
            picture = Image.new("RGB", (40 + number, 30), colour)
            suffix = ("png", "jpg", "bmp")[number % 3]
            picture.save(tmp_path / name / ("more" if number % 2 else "") / f"{number}.{suffix}")
    Image.new("RGBA", (10, 90), (255, 0, 0, 0)).save(tmp_path / "cats" / "clear.png")
    return tmp_path


def test_a_folder_has_a_class_for_every_sub_folder(pictures):
    data = SOURCES["folder"](pictures, 16)
    assert list(data.classes) == ["cats", "dogs"]
    assert len(data.train) + len(data.test) == 61
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert 0 < len(data.test) < 15
    for split in (data.train, data.test):
        means = split.images.float().mean((2, 3))
        blue = split.labels == 1
        assert (means[blue, 2] > 200).all()
        assert (means[~blue, 0] > 200).all()
    assert (data.train.images.float().mean((1, 2, 3)) > 250).any()  # the clear one is white
    assert data.train.labels.diff().count_nonzero() > 10  # the first images are of every class
    before = {tuple(image.flatten().tolist()) for image in data.test.images}
    Image.new("RGB", (9, 9), "green").save(pictures / "dogs" / "another.png")
    after = SOURCES["folder"](pictures, 16).test
    assert before <= {tuple(image.flatten().tolist()) for image in after.images}


def test_a_folder_without_sub_folders_is_one_class(pictures):
    data = SOURCES["folder"](pictures / "cats" / "more", None)
    assert (list(data.classes), data.train.images.shape[-1]) == (["image"], 64)


def test_a_folder_that_cannot_be_used_is_explained(pictures, monkeypatch):
    load = SOURCES["folder"]
    (pictures / "empty").mkdir()
    few = pictures / "few"
    few.mkdir()
    Image.new("RGB", (4, 4)).save(few / "one.png")
    for path, message in (
        (None, "'folder' needs the folder of your images"),
        (pictures / "nowhere", "nowhere is not a folder"),
        (pictures / "cats" / "0.png", "is not a folder"),
        (pictures / "empty", "holds no images"),
        (few, "has 1 image; training and test need one each"),
    ):
        with pytest.raises(FewlinesError, match=message):
            load(path, None)
    (few / "one.png").unlink()
    broken = pictures / "cats" / "broken.png"
    broken.write_bytes((pictures / "cats" / "0.png").read_bytes()[:40])
    with pytest.raises(FewlinesError, match=r"broken\.png cannot be read as an image"):
        load(pictures, None).save(pictures / "images")
    broken.unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FewlinesError, match="too large for an image"):
        load(pictures, None).save(pictures / "images")
    for source in ("shapes", "fashion-mnist", "cifar10"):
        with pytest.raises(FewlinesError, match=r"data\.side: .* leave the side out"):
            SOURCES[source](None, 32)


def test_cifar10_is_read_from_files_in_its_layout(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        pixels = random.integers(256, size=(4, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": [number, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    with pytest.raises(FewlinesError, match="CIFAR-10 is not complete"):
        SOURCES["cifar10"](tmp_path, None)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = SOURCES["cifar10"](tmp_path, None)
    assert data.train.images.shape == (20, 3, 32, 32)
    assert data.train.labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert data.test.labels.tolist() == [5, 1, 2, 3]
    red = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0, :1024]
    assert data.train.images[0, 0].flatten().tolist() == red.tolist()


def test_a_truncated_file_of_images_is_refused(tmp_path):
    path = tmp_path / "images.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(FewlinesError, match="not a complete safetensors file"):
        ImageData.load(path)
