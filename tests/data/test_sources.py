import gzip

import pytest
import torch

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


def test_a_truncated_file_of_images_is_refused(tmp_path):
    path = tmp_path / "images.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(FewlinesError, match="not a complete safetensors file"):
        ImageData.load(path)
