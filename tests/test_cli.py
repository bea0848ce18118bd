"""The stages as commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fewlines
from conftest import GRID
from fewlines.cli import main
from fewlines.data.images import ImageData, Split
from fewlines.decode.sampler import Sampler
from fewlines.files import read_json, read_tensors, write_tensors
from fewlines.metrics.likelihood import measure_likelihood
from fewlines.models.base import Model
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape
from fewlines.stages import MODULES, load_stage


def test_a_stage_runs_by_hand(tiny_files):
    given = {name: name for name in ("config", "model", "tokens")} | {"output": "out.json"}
    options = [f"--{name}={tiny_files / file}" for name, file in given.items()]
    assert main(["measure-likelihood", "--cache=lines-1lines", *options]) == 0
    found = read_json(tiny_files / "out.json")
    assert found["images"] == 6
    assert len(found["kl_by_line"]) == 4
    assert found["nll_delta_low"] <= found["nll_delta"] <= found["nll_delta_high"]


def test_the_options_of_a_policy_are_searched_on_training_images(tiny_files):
    text = (tiny_files / "config").read_text().replace("images: 6, curve", "images: 2, curve")
    search = (
        "search: {images: 4, trials: 3, budgets: {lines: [2]}, "
        "policies: {streaming: {sinks: [0, 4, 2, 8]}, knorm: {}}}\n"
    )
    (tiny_files / "config").write_text(text + search)
    given = [f"--{name}={tiny_files / name}" for name in ("config", "model", "tokens")]
    (tiny_files / "search").mkdir()
    for slug in ("streaming-2lines", "knorm-2lines"):
        output = f"--output={tiny_files / f'search/{slug}.json'}"
        assert main(["search-options", *given, f"--cache={slug}", output]) == 0
    assert main(["baselines", given[0], f"--run={tiny_files}"]) == 0
    table = pd.read_csv(tiny_files / "tables/baselines.csv")
    tried = {"streaming", "streaming(sinks=0)", "streaming(sinks=2)", "knorm"}
    assert set(table["policy"]) == tried
    assert sorted(table["place"]) == [1, 1, 2, 3]
    assert set(table["rank"]) == {1, 2}
    assert table["nll"][0] == table["nll"].min()
    assert table["behind"][0] == 0
    assert np.allclose(table["behind"], table["nll"] - table["nll"][0], atol=1e-5)
    model = load_network(tiny_files / "model", Model)
    tokens, _ = read_tensors(tiny_files / "tokens")
    first = 2 + 2  # after the calibration's
    labels, codes = (tokens[f"train_{kind}"][first : first + 4] for kind in ("labels", "codes"))
    cache = fewlines.cache("knorm", lines=2)
    found = measure_likelihood(model, labels, codes, cache, batch=4)
    assert table.set_index("policy")["nll"]["knorm"] == pytest.approx(
        found.nll.mean().item(), rel=1e-4
    )


def test_heads_with_several_merge_slots_are_calibrated_for_and_drawn_with(tiny_files, capsys):
    text = (
        (tiny_files / "config")
        .read_text()
        .replace(
            "paper:",
            "  - {policy: scheduled, budget: {lines: 2}, merge: true, allocation: bands}\npaper:",
        )
    )
    (tiny_files / "config").write_text(text)
    common = [f"--config={tiny_files / 'config'}", f"--model={tiny_files / 'model'}"]
    tokens = f"--tokens={tiny_files / 'tokens'}"
    paths = [tiny_files / name for name in ("once", "more", "likelihood", "drawn")]
    calibrations = [f"--calibration={path}" for path in paths[:2]]
    outputs = [f"--output={path}" for path in paths]
    cache = "--cache=scheduled+merge+bands-2lines"
    assert main(["calibrate", *common, tokens, outputs[0]]) == 0
    assert main(["measure-likelihood", *common, tokens, calibrations[0], cache, outputs[2]]) == 2
    assert "'fewlines calibrate --calibration' adds that" in capsys.readouterr().err
    assert main(["calibrate", *common, tokens, calibrations[0], outputs[1]]) == 0
    assert main(["measure-likelihood", *common, tokens, calibrations[1], cache, outputs[2]]) == 0
    assert read_json(paths[2])["nll_delta"] != 0
    assert main(["generate", *common, calibrations[1], cache, "--shard=0", outputs[3]]) == 0


def test_tasks_complete_images_and_draw_without_a_class(tiny_files):
    """What is given stays, what is not is drawn; nats of a completion are of the rest alone."""
    given = [f"--{name}={tiny_files / name}" for name in ("config", "model", "tokens")]

    def run(stage: str, row: str, cache: str = "lines-1lines") -> Path:
        output = tiny_files / f"{stage}-{row}"
        shard = ["--shard=0"] if stage == "generate" else []
        command = [stage, *given, f"--row={row}", f"--cache={cache}", f"--output={output}", *shard]
        assert main(command) == 0
        return output

    tokens, _ = read_tensors(tiny_files / "tokens")
    drawn, _ = read_tensors(run("generate", "base:completion"))
    whole, _ = read_tensors(run("generate", "base"))
    begun = drawn["seed_0"][:, :10] == tokens["test_codes"][:2, :10]
    assert begun.all()
    assert not torch.equal(drawn["seed_0"][:, 10:], whole["seed_0"][:, 10:])
    blind, _ = read_tensors(run("generate", "base:unconditional"))
    assert (blind["labels"] == 3).all()
    guided, _ = read_tensors(run("generate", "base:guided", "full"))
    model, strong = load_network(tiny_files / "model", Model), Sampler(0.9, guidance=3.0)
    expected = fewlines.generate(model, guided["labels"], fewlines.cache("full"), sampler=strong)
    assert torch.equal(guided["seed_0"], expected[:2].int())
    rest, every = (
        read_json(run("measure-likelihood", row, "full")) for row in ("base:completion", "base")
    )
    labels, codes = tokens["test_labels"][:6], tokens["test_codes"][:6]
    found = model.teacher_forced(labels, codes).log_softmax(-1).gather(-1, codes[..., None])
    assert every["nll"] == pytest.approx(-found.mean().item(), abs=1e-5)
    assert rest["nll"] == pytest.approx(-found[:, 10:].mean().item(), abs=1e-5)


def test_a_task_may_be_compared_with_training_images(tiny_files, monkeypatch):
    """The last ones, as many as there are test images; its temperature stands beside it."""
    config = (tiny_files / "config").read_text()
    config = config.replace("kid_subset_size: 2", "kid_subset_size: 2, neighbours: 2")
    config = config.replace("tasks:", "tokenizer: {widths: [4]}\ntasks:")
    config += "  hot: {temperature: 1.5, against: train, caches: [full]}\n"
    (tiny_files / "config").write_text(config)
    images = torch.randint(256, (12, 1, 4, 5), dtype=torch.uint8)
    train, test = Split(images, torch.arange(12) % 3), Split(images[:3] // 2, torch.arange(3))
    ImageData(train, test, ["a", "b", "c"]).save(tiny_files / "images")
    save_network(tiny_files / "tokenizer", ConvTokenizer(TokenizerShape(1, (4,), 0, 16, 4)))
    save_network(tiny_files / "classifier", Classifier(ClassifierShape(1, (4,), 8, 3)))
    given = [f"--{name}={tiny_files / name}" for name in ("config", "model", "tokens")]
    drawn = tiny_files / "drawn"
    command = ["--row=base:hot", "--cache=full", "--shard=0", f"--output={drawn}"]
    assert main(["generate", *given, *command]) == 0
    compared = []

    def measure(sets, reference, features, settings):
        compared.append(reference)
        return [{"fid": 1.0}]

    monkeypatch.setattr("fewlines.stages.quality.measure", measure)
    found = []
    for row in ("base", "base:hot"):
        files = [f"--{name}={tiny_files / name}" for name in ("images", "tokenizer", "classifier")]
        files += [f"--samples={drawn}", f"--output={tiny_files / 'quality'}", f"--row={row}"]
        assert main(["measure-quality", given[0], *files]) == 0
        found.append(read_json(tiny_files / "quality"))
    assert torch.equal(compared[0], test.images)
    assert torch.equal(compared[1], train.images[-3:])
    assert [(each["against"], each["temperature"]) for each in found] == [
        ("test", 0.9), ("train", 1.5),
    ]  # fmt: skip


def test_a_model_that_remembers_draws_what_is_at_no_distance_from_a_training_image(tiny_files):
    text = (tiny_files / "config").read_text()
    text = text.replace("kid_subset_size: 2", "kid_subset_size: 2, neighbours: 2")
    (tiny_files / "config").write_text(text.replace("tasks:", "tokenizer: {widths: [4]}\ntasks:"))
    tokenizer = ConvTokenizer(TokenizerShape(1, (4,), 0, 16, 4))
    save_network(tiny_files / "tokenizer", tokenizer)
    save_network(tiny_files / "classifier", Classifier(ClassifierShape(1, (4,), 8, 3)))
    codes = torch.randint(16, (12, 20), generator=torch.Generator().manual_seed(0))
    made = tokenizer.eval().decode(codes.unflatten(1, GRID))
    write_tensors(tiny_files / "samples", {"seed_0": codes.int()}, {"grid": GRID})
    noise = torch.randint(256, (30, *made.shape[1:]), dtype=torch.uint8)
    train = torch.cat([noise, made[:2]])
    names = ("images", "tokenizer", "classifier", "samples", "config")
    options = [*(f"--{name}={tiny_files / name}" for name in names), f"--run={tiny_files}"]
    splits = [Split(each, torch.arange(len(each)) % 3) for each in (train, noise[:20] // 2)]
    ImageData(*splits, ["a", "b", "c"]).save(tiny_files / "images")
    assert main(["find-nearest", *options]) == 0
    table = pd.read_csv(tiny_files / "tables/neighbours.csv").set_index(["images", "space"])
    assert set(table.index) == {
        (images, space) for images in ("drawn", "test") for space in ("pixels", "features")
    }
    assert (table["count"] == 12).all()
    assert (table.loc["drawn", "smallest"] < 1e-5).all()  # rounded, in batches of other sizes
    assert (table.loc["test", "smallest"] > 0).all()
    assert (table["twentieth"] <= table["median"]).all()
    shown = pd.read_csv(tiny_files / "figures/neighbours.csv")
    assert (shown.iloc[:2] == 0).all(axis=None)
    assert (tiny_files / "figures/neighbours-dark.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_needs_its_images_and_a_name(tiny_files, capsys):
    given = [f"--{name}={tiny_files / name}" for name in ("config", "model")]
    given += ["--cache=full", "--shard=0", f"--output={tiny_files / 'out'}"]
    assert main(["generate", *given, "--row=base:completion"]) == 2
    assert "--tokens names the file" in capsys.readouterr().err
    for row in ("base:complete", "completion", "adapted:typo"):  # never quietly whole images
        assert main(["generate", *given, f"--row={row}"]) == 2
    assert "it has base, base:completion, base:unconditional" in capsys.readouterr().err
    assert not (tiny_files / "out").exists()


@pytest.mark.parametrize("stage", MODULES)
def test_every_stage_says_what_it_does_and_what_its_options_are(stage, capsys):
    assert load_stage(stage).__doc__
    assert main([stage, "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--threads" in text
    for name in inspect.signature(load_stage(stage)).parameters:
        described = re.search(rf"--{name.replace('_', '-')}[^-]* (?:PATH|TEXT|INTEGER|\[)?", text)
        assert described, name


def test_the_help_lists_every_stage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in MODULES)
