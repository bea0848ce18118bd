"""The studies of emoji that are made for a GPU, at toy size and on a processor: from archives to
the paper's table of a model that goes on from a smaller grid."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
import yaml

from fewlines.models.checkpoint import save_network
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape
from toy_chain import REPOSITORY, TOY, make_folder, snakemake
from toy_emoji import draw_square, write_set

COLOURS = ["red", "green", "blue", "gold", "pink", "teal", "navy", "lime", "gray", "cyan"]
THINGS = [f"thing{number}" for number in range(200)]


def shrink(name: str, folder: Path, side: int) -> dict:
    """A study with as many kinds of jobs, at one budget, of a network of a few thousand weights."""
    study = yaml.safe_load((REPOSITORY / f"experiments/{name}.yaml").read_text())
    toy = yaml.safe_load(TOY.read_text())
    models = study["adaptation"]["models"]
    for cache in study["caches"][1:]:
        cache["budget"] = {"lines": 2}
    models["adapted"]["caches"] = ["full", "scheduled+merge-2lines"]
    shape = {"dim": 16, "layers": 2, "heads": 2, "batch": 4, "steps": 4, "warmup": 1}
    return study | {
        "precision": "float32",
        "storage": "float16",
        "training": {"compile": False},  # it takes a compiler
        "data": study["data"] | {"path": str(folder / "archives"), "side": side},
        "tokenizer": {"weights": str(folder / "tokenizer.safetensors")},
        "classifier": toy["classifier"],
        "model": study["model"] | shape,
        "calibration": {"images": 8, "curve_images": 2, "batch": 4},
        "likelihood": {"images": 6, "batch": 3},
        "adaptation": {"batch": 4, "steps": 4, "warmup": 1, "models": models},
        "sampling": study["sampling"] | {"samples": 12, "batch": 6, "shards": 1},
        "quality": {"features": "classifier", "kid_subset_size": 5, "kid_subsets": 2},
        "cost": {"batch": 4, "repeats": 1},
        "paper": {"caches": ["scheduled+merge-2lines"], "batch": 4, "repeats": 1},
    }


def test_the_paper_s_table_of_a_model_that_goes_on_from_a_smaller_grid(tmp_path):
    (tmp_path / "archives").mkdir()
    for style, shift in (("noto", 0), ("twemoji", 1)):
        icons = {each: draw_square(COLOURS[(i + shift) % 10]) for i, each in enumerate(THINGS)}
        write_set(tmp_path / "archives", style, icons, {}, {"Objects": THINGS})
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(TokenizerShape(3, (4, 4, 8), 0, 16, 4))
    save_network(tmp_path / "tokenizer.safetensors", tokenizer)
    run = tmp_path / "run"
    make_folder(run)
    tables = Path("results/emoji-gpu-64/tables")
    for name, side, targets in (
        ("emoji-gpu", 16, ["results/emoji-gpu/base/model.safetensors"]),
        ("emoji-gpu-64", 32, [str(tables / "cache.csv"), str(tables / "paper.csv")]),
    ):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(shrink(name, tmp_path, side)))
        snakemake(run, *targets, config=config)
    cache, paper = (pd.read_csv(run / tables / name) for name in ("cache.csv", "paper.csv"))
    assert (cache["grid"] == "8x8").all()
    drawn = cache.dropna(subset="fid_mean")
    assert set(drawn["model"]) == {"base", "base+steps", "adapted"}
    assert {"full", "scheduled+merge", "line_ar(anchor=auto)+merge"} <= set(drawn["policy"])
    few = paper[paper["cache"] == "scheduled+merge-2lines"].set_index("model")
    assert set(few.index) == {"base", "adapted"}
    assert (few["kv_memory_ratio"] > 2).all()
    assert few[["process_bytes", "seconds_per_image", "fid_mean"]].notna().all(axis=None)
