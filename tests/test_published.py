"""LlamaGen's published layout from a folder of images to the report, as experiments/imagenet.yaml
has it: random weights, tiny sizes."""

from __future__ import annotations

import itertools
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from fewlines.config import load_experiment
from fewlines.errors import FewlinesError
from fewlines.files import read_json
from fewlines.metrics.quality import read_statistics, resize
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.models.llamagen.tokenizer import LlamaGenTokenizer, LlamaGenTokenizerShape
from toy_chain import REPOSITORY, TOY, make_folder, snakemake

FEATURES = 16


def publish_toys(folder) -> None:
    """A checkpoint, a tokenizer, pictures of two classes and reference statistics."""
    torch.manual_seed(0)
    tokenizer = LlamaGenTokenizer(LlamaGenTokenizerShape(3, 32, (1, 1, 1), 1, 8, 16, 4))
    torch.save({"model": tokenizer.state_dict(), "ema": {}}, folder / "vq.pt")
    model = Transformer(TransformerShape(32, 2, 4, 4, 16, 2, (4, 4), multiple_of=32))
    model.initialise(torch.Generator().manual_seed(0))
    told = Namespace(image_size=16, downsample_size=4, num_classes=2)
    torch.save({"model": model.state_dict(), "optimizer": {}, "args": told}, folder / "c2i.pt")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(60):
            pixels = random.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{name}/{number}.png")
    np.savez(folder / "reference.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))


def test_published_weights_go_from_images_to_report(tmp_path):
    publish_toys(tmp_path)
    protocol = yaml.safe_load((REPOSITORY / "experiments/imagenet.yaml").read_text())
    toy = yaml.safe_load(TOY.read_text())
    quarter = {"budget": {"fraction": "1/4"}}  # of the protocol's three
    caches = [cache | quarter for cache in protocol["caches"] if cache["policy"] != "full"]
    for cache in caches:
        if cache["policy"] != "scheduled":
            cache["measure"] = "likelihood"
    models = protocol["adaptation"]["models"]
    models["adapted:2lines"]["caches"] = ["scheduled+merge-1of4"]
    experiment = {
        **protocol,
        **{key: toy[key] for key in ("classifier", "cost", "storage") if key in toy},
        "name": "published",
        "precision": "float32",
        "data": {"source": "folder", "path": str(tmp_path / "images"), "side": 16, "shards": 2},
        "tokenizer": {"weights": str(tmp_path / "vq.pt")},
        "model": {"checkpoint": str(tmp_path / "c2i.pt"), "heads": 4},
        "sampling": protocol["sampling"] | {"samples": 40, "batch": 20, "shards": 2},
        "quality": {"features": "classifier", "reference": str(tmp_path / "reference.npz"),
                    "side": 28, "kid_subset_size": 5, "kid_subsets": 2},
        "likelihood": {"images": 8, "batch": 4},
        "calibration": {"images": 8, "curve_images": 2, "batch": 4},
        "adaptation": protocol["adaptation"] | {"steps": 4, "batch": 4, "warmup": 1},
        "paper": {"caches": ["scheduled+merge-1of4"], "batch": 4, "repeats": 1},
        "efficiency": {"runs": []},
        "caches": [{"policy": "full"}, *caches],
    }  # fmt: skip
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(experiment))
    make_folder(tmp_path / "run")
    snakemake(tmp_path / "run", config=tmp_path / "published.yaml")
    run = tmp_path / "run/results/published"
    table = pd.read_csv(run / "tables/cache.csv")
    base = table[table["model"] == "base"].set_index("policy")
    assert base.loc["scheduled+merge", "kv_bytes"] < base.loc["full", "kv_bytes"] / 2
    drawn = table[table["policy"].str.contains("full|scheduled")]
    assert drawn["fid_mean"].notna().all()
    assert set(drawn["model"]) == {"base", "base+steps", "adapted:2lines"}
    options = ("line_ar(anchor=auto)", "streaming(sinks=auto)")
    seen = {"scheduled+merge+allocated", *options, *(f"{name}+merge" for name in options)}
    assert seen <= set(base.index)
    assert table["nll"].notna().all()
    assert (run / "report.html").exists()
    quality = read_json(run / "base/quality/full.json")
    assert quality["statistics"].endswith("reference.npz")
    metrics = read_json(run / "tokenizer.json")
    assert 0 < metrics["codes_used"] <= 1


def test_every_piece_of_the_protocol_is_there():
    experiment = load_experiment(
        [REPOSITORY / "config.yaml", REPOSITORY / "experiments/imagenet.yaml"]
    )
    assert experiment.sampling.samples == 50_000
    assert (experiment.quality.features, experiment.quality.side) == ("inception", 256)
    assert experiment.adaptation.models["adapted:2lines"].distil > 0
    options = ("line_ar(anchor=auto)", "streaming(sinks=auto)")
    wanted = {f"{name}{merge}" for name in options for merge in ("", "+merge")}
    wanted |= {"scheduled+merge", "scheduled+merge+allocated"}
    shares = ("fraction: 1/4", "fraction: 1/6", "fraction: 1/8")
    caches = {(each.policy_text, each.budget_text) for each in experiment.cache_by_slug.values()}
    assert caches == {("full", "all"), *itertools.product(wanted, shares)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "are not of the 16 features"),
        ({"mu": np.zeros(16)}, "has mu; wanted are mu and sigma"),
        ({"mu": np.full(16, np.nan), "sigma": np.eye(16)}, "not finite"),
        ({"mu": np.array([{}] * 16), "sigma": np.eye(16)}, "is not a .npz file of numbers"),
    ],
)
def test_other_statistics_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "reference.npz", **content)
    with pytest.raises(FewlinesError, match=message):
        read_statistics(tmp_path / "reference.npz", 16)


def test_images_are_brought_to_a_side():
    images = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    assert torch.equal(resize(images, 4), images[..., :4, :4])
    assert resize(images, 8) is images
