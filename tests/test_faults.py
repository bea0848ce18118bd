"""Inputs that failed once, after public bug reports of neighbouring projects: each with the right
value or the right sentence. A1, A2 and B13 are in test_plans, A6 is in test_api."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fewlines
from fewlines.cache.schedule import Schedule
from fewlines.calibration.data import Calibration
from fewlines.cli import main
from fewlines.config import load_experiment, validate_experiment
from fewlines.config.checks import DataFacts, check_against_data
from fewlines.config.tokenizer import TokenizerSettings
from fewlines.data import SOURCES
from fewlines.data.folder import choose_test
from fewlines.errors import FewlinesError
from fewlines.files import digest_folder, read_json, read_tensors, write_tensors
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.training.loop import train
from fewlines.training.tokenizer import TokenizerObjective
from toy_chain import TOY, make_folder, plan, snakemake

# A3: options of policies, by YAML, by the command line and in Python.

OPTIONS = [
    ("line_ar", {"pool": "Mean"}, "line_ar: pool: Input should be 'mean', 'max', 'query' or"),
    ("line_ar", {"recent": -1}, "line_ar: recent: Input should be greater than or equal to 0"),
    ("snapkv", {"window": 0}, "snapkv: window: Input should be greater than 0 (found 0)"),
    ("snapkv", {"kernel": 4}, "snapkv: kernel: write an odd number (found 4)"),
    ("streaming", {"sinks": "four"}, "streaming: sinks: write a number of tokens"),
    ("tova", {"every": "two"}, "tova: every: Input should be a valid integer"),
]


@pytest.mark.parametrize(("policy", "options", "sentence"), OPTIONS)
def test_a3_options_get_the_same_sentence_everywhere(policy, options, sentence, tmp_path, capsys):
    with pytest.raises(FewlinesError) as in_python:
        fewlines.cache(policy, lines=2, **options)
    assert sentence in str(in_python.value)
    line = {"policy": policy, "budget": {"lines": 2}, "options": options}
    with pytest.raises(FewlinesError) as in_yaml:
        validate_experiment({"caches": [line]})
    assert f"caches.0: {in_python.value}" in str(in_yaml.value)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"caches": [line]}))
    assert main(["tables", f"--config={tmp_path / 'e.yaml'}", f"--run={tmp_path}"]) == 2
    assert str(in_python.value) in capsys.readouterr().err


def test_a3_the_oracle_is_measured_by_likelihood_alone():
    oracle = {"policy": "oracle", "budget": {"lines": 2}}
    assert validate_experiment({"caches": [{**oracle, "measure": "likelihood"}]})
    for measure in ("samples", "all"):
        with pytest.raises(FewlinesError, match=r"caches\.0: oracle .* write measure: likelihood"):
            validate_experiment({"caches": [{**oracle, "measure": measure}]})
    for elsewhere in (
        {"paper": {"caches": ["oracle-2lines"]}},
        {"tasks": {"c": {"prompt_lines": 1, "caches": ["oracle-2lines"]}}},
        {"adaptation": {"models": {"adapted": {"caches": ["oracle-2lines"]}}}},
    ):
        with pytest.raises(FewlinesError, match="oracle is applied to a finished image"):
            validate_experiment(elsewhere)


# A4: images of more than eight bits.


def test_a4_sixteen_bits_are_scaled_by_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    for name in ("one.png", "other.png", "third.tif"):
        Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / name)
    data = SOURCES["folder"](tmp_path, 256)
    for split in (data.train, data.test):
        for image in split.images:
            assert (image[:, 0].int() - torch.arange(256)).abs().max() <= 1


@pytest.mark.parametrize(("mode", "what"), [("F", "floats"), ("I", "32-bit integers")])
def test_a4_numbers_without_a_range_are_refused(tmp_path, mode, what):
    for name in ("one.tif", "other.tif"):
        Image.new(mode, (8, 8), 3).save(tmp_path / name)
    with pytest.raises(FewlinesError, match=rf"holds {what}, whose range it does not state"):
        _ = SOURCES["folder"](tmp_path, 8).train.images


# A5: folders.


def draw_pictures(folder: Path, count: int, colour: str = "red") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (9, 9), colour).save(folder / f"{colour}{number}.png")


def test_a5_what_is_hidden_is_no_class_and_what_is_left_out_is_said(tmp_path, capsys):
    draw_pictures(tmp_path / ".thumbnails", 30)
    draw_pictures(tmp_path / ".ipynb_checkpoints", 30)
    draw_pictures(tmp_path, 12)
    assert list(SOURCES["folder"](tmp_path, 8).classes) == ["image"]
    draw_pictures(tmp_path / "cats", 20)
    draw_pictures(tmp_path / "cats" / ".cache", 5)
    (tmp_path / "cats" / "notes.txt").write_text("cats")
    capsys.readouterr()
    data = SOURCES["folder"](tmp_path, 8)
    assert list(data.classes) == ["cats"]
    assert len(data.train) + len(data.test) == 20
    said = capsys.readouterr().err
    assert "12 pictures beside the classes' folders left out" in said
    assert "1 files that are no pictures left out" in said


def test_a5_links_are_followed_once_and_all_that_pillow_reads_is_read(tmp_path):
    draw_pictures(tmp_path / "elsewhere", 5)
    for suffix in ("ppm", "tga", "ico", "jp2", "avif"):
        try:
            Image.new("RGB", (16, 16)).save(tmp_path / "elsewhere" / f"one.{suffix}")
        except (OSError, KeyError):
            continue
    count = len(list((tmp_path / "elsewhere").iterdir()))
    assert count > 7
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    data = SOURCES["folder"](tmp_path / "data", 8)
    assert len(data.train) + len(data.test) == count


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_a5_every_class_has_training_and_test_images(count, tmp_path):
    for seed in range(40):
        names = [Path(f"{seed}/{number}.png") for number in range(count)]
        chosen = choose_test(names, 10)
        assert 0 < sum(chosen) < count
    draw_pictures(tmp_path / "cats", 20)
    draw_pictures(tmp_path / "dogs", 1)
    with pytest.raises(FewlinesError, match=r"class .dogs. of .* has 1 image; training and test"):
        SOURCES["folder"](tmp_path, 8)


def test_a5_a_side_of_nothing_is_refused(tmp_path, capsys):
    draw_pictures(tmp_path / "in", 20)
    command = ["fetch-data", "--source=folder", f"--path={tmp_path / 'in'}"]
    assert main([*command, "--side=0", f"--output={tmp_path / 'out'}"]) == 2
    assert "'--side'" in capsys.readouterr().err
    with pytest.raises(FewlinesError, match=r"data\.side"):
        validate_experiment({"data": {"source": "folder", "path": str(tmp_path), "side": 0}})


def test_a5_a_folder_is_watched_by_content(tmp_path):
    draw_pictures(tmp_path, 3)
    before = digest_folder(tmp_path)
    (tmp_path / "red0.png").touch()
    assert digest_folder(tmp_path) == before
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "red0.png")
    changed = digest_folder(tmp_path)
    draw_pictures(tmp_path, 4)
    assert len({before, changed, digest_folder(tmp_path)}) == 3


def test_a5_two_folders_of_one_name_share_nothing(tmp_path):
    slugs = {
        validate_experiment({"data": {"source": source, "path": str(path)}}).data.slug
        for source in ("folder", "emoji")
        for path in (tmp_path / "a/pictures", tmp_path / "b/pictures")
    }
    assert len(slugs) == 4
    strange = tmp_path / "a b;c$d'e\"f{g}\nh"
    slug = validate_experiment({"data": {"source": "folder", "path": str(strange)}}).data.slug
    assert not set(slug) & set(" ;$'\"{}\n/")


# A7: what the data cannot satisfy.

ENOUGH = DataFacts(train=60000, test=10000, side=(28, 28), grid=(14, 14))
ASKED = [
    ({"test": 100}, r"quality\.kid_subset_size: 500 of 100 test images; write 100 or less"),
    ({"test": 3}, r"quality\.neighbours: 3 of 3 test images and 1000 samples; write 2 or less"),
    (
        {"train": 59999},
        r"data\.images: 70000 must be there, and there are 69999; is the copy whole",
    ),
    ({"test": 1}, "data: 1 test images; at least 2"),
    ({"train": 300}, r"calibration\.images: 300 and 32 of curve_images are more than the 300"),
    ({"train": 2000}, r"sampling\.samples: .* 3000 for 3 seeds; there are 2000"),
    ({"side": (27, 28)}, "2 levels make tokens of 2×2 pixels, which do not divide images of 27×28"),
    ({"grid": (2, 14)}, r"tasks\.c\.prompt_lines: 2 of an image of 2 lines; write 1 or less"),
    ({"grid": (4, 2)}, r"caches: scheduled\+merge-0\.5lines has no token beside its merge slot"),
]


@pytest.mark.parametrize(("changed", "message"), ASKED)
def test_a7_settings_are_checked_against_the_data(changed, message):
    content = {
        "data": {"images": 70000},
        "tasks": {"c": {"prompt_lines": 2, "caches": ["scheduled+merge-0.5lines"]}},
    }
    experiment = validate_experiment(content)
    check_against_data(experiment, ENOUGH)
    facts = DataFacts(**{**vars(ENOUGH), **changed})
    with pytest.raises(FewlinesError, match=message):
        check_against_data(experiment, facts)


def test_a7_nothing_is_trained_before(tmp_path, capsys):
    draw_pictures(tmp_path / "in", 30)
    data = tmp_path / "data"
    command = ["fetch-data", "--source=folder", f"--path={tmp_path / 'in'}", "--side=8"]
    assert main([*command, f"--output={data}"]) == 0
    files = [f"--output={tmp_path / 'weights'}", f"--metrics={tmp_path / 'metrics'}"]
    (tmp_path / "config").write_text("{}")
    for stage in ("train-tokenizer", "train-classifier"):
        config = f"--config={tmp_path / 'config'}"
        assert main([stage, config, f"--images={data}", *files]) == 2
        assert "quality.kid_subset_size: 500 of" in capsys.readouterr().err
    assert not (tmp_path / "weights.checkpoints").exists()


WRONG = [
    ({"quality": {"kid_subset_size": 1}}, r"kid_subset_size: .*greater than 1"),
    ({"tokenizer": {"levels": 1}}, r"tokenizer\.levels: .*greater than 1"),
    (
        {"tokenizer": {"levels": 9, "weights": "a"}},
        "levels and two_levels are three",
    ),
    ({"tokenizer": {"widths": []}}, r"tokenizer\.widths: .*at least 1 item"),
    ({"classifier": {"widths": []}}, r"classifier\.widths: .*at least 1 item"),
    ({"seed": 10**30}, "seed: .*less than 4294967296"),
    ({"sampling": {"seeds": [0, 0]}}, "sampling.seeds: one is listed more than once"),
    ({"tokenizer": {"learning_rate": float("inf")}}, "learning_rate: .*finite number"),
    ({"tokenizer": {"learning_rate": float("nan")}}, "learning_rate: .*finite number|greater"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a7_values_that_nothing_can_satisfy(content, message):
    with pytest.raises(FewlinesError, match=message):
        validate_experiment(content)


# A8: trainings that diverge, checkpoints that are damaged.


def make_task(rate: float) -> TokenizerObjective:
    settings = TokenizerSettings(widths=(4, 4), codes=8, steps=30, batch=4, learning_rate=rate)
    images = torch.randint(256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return TokenizerObjective(settings, images.to(torch.uint8), seed=0)


def test_a8_a_diverged_training_fails_and_its_advice_works(tmp_path):
    with pytest.raises(FewlinesError, match="lower its rates and run again"):
        train(make_task(1e30), "tokenizer", tmp_path / "c", checkpoint_seconds=0)
    task = make_task(1e-3)  # as advised
    assert train(task, "tokenizer", tmp_path / "c", checkpoint_seconds=60) > 0
    assert all(tensor.isfinite().all() for tensor in task.network.state_dict().values())


def save(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", ["optimizers.pt", "weights.safetensors", "task.json"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", save([{}])])  # as it was once
def test_a8_a_damaged_checkpoint_begins_anew_and_says_so(tmp_path, capsys, damage, content):
    first = make_task(1e-3)
    train(first, "tokenizer", tmp_path, checkpoint_seconds=60)
    (last,) = tmp_path.glob("step-*")
    (last / damage).write_bytes(content)
    again = make_task(1e-3)
    assert train(again, "tokenizer", tmp_path, checkpoint_seconds=60) > 0
    assert "is damaged" in capsys.readouterr().err
    for one, other in zip(
        first.network.state_dict().values(), again.network.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


# B9: hostile paths.

HOSTILE = "a b;touch hacked;'\"$HOME`id`{x}\n" + "l" * 200


def test_b9_hostile_paths_from_images_to_tokens(tmp_path):
    pictures = tmp_path / "pictures" / HOSTILE
    for name, colour in (("one {class}", "red"), ("$other;", "blue")):
        draw_pictures(pictures / name, 30, colour)
    with open(os.fsencode(pictures / "$other;") + b"/\xff\xfe.png", "wb") as file:  # noqa: PTH123
        Image.new("RGB", (9, 9)).save(file, "PNG")
    experiment = yaml.safe_load(TOY.read_text()) | {"name": "hostile"}
    experiment["data"] = {"source": "folder", "path": str(pictures), "side": 8}
    experiment |= {"sampling": {"samples": 5, "seeds": [0], "shards": 1}}
    experiment["quality"] = {"kid_subset_size": 2, "neighbours": 1}
    config = tmp_path / "hostile.yaml"
    config.write_text(yaml.safe_dump(experiment))
    folder = tmp_path / "work {dir}"
    make_folder(folder)
    assert "has braces in its name" in plan(folder, "-n", config=config, status=1)
    folder = tmp_path / "work 'dir' $x;\"y"
    make_folder(folder)
    snakemake(folder, "results/hostile/tokens.safetensors", config=config)
    tensors, header = read_tensors(folder / "results/hostile/tokens.safetensors")
    assert header["classes"] == 2
    assert sum(len(tensors[f"{part}_codes"]) for part in ("train", "test")) == 61
    assert not list(tmp_path.rglob("hacked"))


# B10: the configuration's loader.

LOADER = [
    ({"tasks": {"c": {"prompt_line": 2, "caches": ["full"]}}}, "did you mean 'prompt_lines'"),
    ({"adaptation": {"models": {"adapted": {"cachs": ["full"]}}}}, "did you mean 'caches'"),
    ({"data": {"source": ["folder"]}}, r"data\.source: .*valid string"),
    ({"paper": {"caches": [["full"]]}}, r"paper\.caches\.0: .*valid string"),
    ({"efficiency": {"runs": [{"shape": ["llamagen-b"]}]}}, "shape: .*valid string"),
    ({"model": {"family": ["llamagen"]}}, "unknown model family"),
    ({"model": {"shape": ["llamagen-b"]}}, r"model\.shape: .*valid string"),
    ({"caches": [{"policy": ["lines", ["streaming"]], "budget": {"lines": 2}}]}, "valid string"),
    ({"caches": [{"policy": "lines", "budget": {"lines": 2}, "options": {3: 4}}]}, "valid string"),
    ({"caches": "lines"}, "caches: .*tuple"),
    ({"name": 3}, "name: .*valid string"),
    ({"name": "reference"}, "results/reference is not a run's"),
    ({"name": "data"}, "results/data is not a run's"),
]


@pytest.mark.parametrize(("content", "message"), LOADER)
def test_b10_what_is_no_configuration_is_a_sentence(content, message):
    with pytest.raises(FewlinesError, match=message):
        validate_experiment(content)


FILES = {
    "utf16": ("name: a".encode("utf-16"), "is not UTF-8 text"),
    "latin1": ("name: ä".encode("latin-1"), "is not UTF-8 text"),
    "twice": (b"model: {steps: 3}\nseed: 1\nmodel: {dim: 64}\n", "'model' is written twice"),
    "inside": (b"model: {steps: 3, steps: 4}\n", "'steps' is written twice"),
    "marked": ("name: a".encode("utf-8-sig"), None),
    "object": (b"name: !!python/object:os.system {}\n", "is not valid YAML"),
    "empty": (b"", None),
}


@pytest.mark.parametrize("name", FILES)
def test_b10_files_are_read_whole_or_refused(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / "e.yaml").write_bytes(content)
    if message is None:
        load_experiment([tmp_path / "e.yaml"])
        return
    with pytest.raises(FewlinesError, match=message):
        load_experiment([tmp_path / "e.yaml"])


def test_b10_snakemake_refuses_a_section_that_is_written_twice(tmp_path):
    make_folder(tmp_path / "fresh")
    config = tmp_path / "twice.yaml"
    config.write_text(TOY.read_text() + "\nsampling: {samples: 3}\n")
    printed = plan(tmp_path / "fresh", "-n", config=config, status=1)
    assert "'sampling' is written twice" in printed


# B11: files of another kind.


@pytest.fixture
def foreign(tmp_path) -> dict[str, Path]:
    """Files that are not what they are taken for."""
    weights = {"weight": torch.zeros(3)}
    headers = {
        "headless": None,
        "listed": {"kind": ["tokenizer"], "shape": {}},
        "shapeless": {"kind": "tokenizer"},
        "flat": {"kind": "tokenizer", "shape": [1, 2]},
        "negative": {
            "kind": "tokenizer",
            "shape": {"channels": -1, "widths": [4], "blocks": 0, "codes": 8, "code_dim": 4},
        },
    }
    for name, header in headers.items():
        write_tensors(tmp_path / name, weights, header)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    save_file(weights, tmp_path / "broken", metadata={"fewlines": "{"})
    save_file(weights, tmp_path / "scalar", metadata={"fewlines": "3"})
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["headless", "listed", "shapeless", "flat", "negative", "theirs", "broken", "scalar", "zero",
     "folder"],
)  # fmt: skip
def test_b11_what_is_no_file_of_ours_is_named_and_stays(foreign, name):
    path = foreign[name]
    for load in (
        lambda: load_network(path, Tokenizer),
        lambda: Schedule.load(path),
        lambda: Calibration.load(path),
        lambda: read_json(path) if name in ("zero", "broken") else load_network(path, Tokenizer),
    ):
        with pytest.raises(FewlinesError, match=name) as caught:
            load()
        assert "delete" not in str(caught.value)
        assert "remove" not in str(caught.value)
    assert path.exists()


def test_b11_tables_that_do_not_belong_together_are_refused(tmp_path):
    tables = {
        "capacity": torch.ones(2, 2),
        "merge_slots": torch.zeros(2, 2),
        "evicted_at": torch.zeros(2, 2, 19),
    }
    for header, message in (
        ({"slug": "lines", "grid": [4, 5], "prefix": 1}, "are no schedule of one model"),
        ({"slug": "lines", "grid": 20, "prefix": 1}, "does not say which schedule"),
        ({"grid": [4, 5], "prefix": 1}, "does not say which schedule"),
    ):
        write_tensors(tmp_path / "schedule", tables, header)
        with pytest.raises(FewlinesError, match=message):
            Schedule.load(tmp_path / "schedule")
    attention = {"attention": torch.zeros(2, 2, 19, 20)}
    for header, message in (
        ({"grid": [4, 5], "images": 3}, "is not of 4×5"),
        ({"grid": [4, 5]}, "does not say what it was measured on"),
    ):
        write_tensors(tmp_path / "calibration", attention, header)
        with pytest.raises(FewlinesError, match=message):
            Calibration.load(tmp_path / "calibration")


# B12: the command line.


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan --shape llamagen-b --cache full --batch -5", "'--batch'"),
        ("plan --shape llamagen-b --cache full --grid 0", "'--grid'"),
        ("watch --seed -1", "'--seed'"),
        ("watch --frames 0", "'--frames'"),
        ("fetch-data --source shapes --side -3", "'--side'"),
        ("generate --shard -1", "'--shard'"),
    ],
)
def test_b12_options_have_ranges(capsys, command, message):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_b12_a_shard_that_is_not_there(tiny_files, capsys):
    given = [f"--{name}={tiny_files / name}" for name in ("config", "model")]
    given += ["--cache=full", "--shard=99", f"--output={tiny_files / 'out'}"]
    assert main(["generate", *given]) == 2
    assert "--shard 99: there are 2, from 0" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["scheduled+merge-4lines", "scheduled+merge+allocated-4lines"])
def test_b12_a_plan_needs_no_calibration(capsys, cache):
    plan = ["plan", "--shape=llamagen-b", "--grid=24", "--device=h200"]
    assert main([*plan, f"--cache={cache}"]) == 0
    calibrated = capsys.readouterr().out
    assert main([*plan, "--cache=streaming+merge-4lines"]) == 0
    assert (
        calibrated.replace(cache, "").split()
        == capsys.readouterr().out.replace("streaming+merge-4lines", "").split()
    )


def test_b12_names_that_are_not_utf8(tmp_path, tiny_files, capsys):
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    strange.mkdir()
    shutil.copy(tiny_files / "model", strange / "model")
    config, tokens = (f"--{name}={tiny_files / name}" for name in ("config", "tokens"))
    measure = ["measure-likelihood", config, tokens, "--cache=full"]
    good = f"--model={tiny_files / 'model'}"
    assert main([*measure, good, f"--output={strange / 'out.json'}"]) == 0
    assert read_json(strange / "out.json")["images"] == 6
    assert main([*measure, f"--model={strange / 'model'}", "--output=o"]) == 2
    assert "is no name in UTF-8" in capsys.readouterr().err
    with pytest.raises(FewlinesError, match="is no name in UTF-8"):
        write_tensors(strange / "tensors", {"a": torch.zeros(1)})
