"""What an experiment will take, counted before it runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from conftest import planned
from fewlines.bench.jobs import Work
from fewlines.bench.passes import count_pass
from fewlines.cli import main
from fewlines.config import load_experiment
from fewlines.devices import DEVICES
from fewlines.stages.work import find_work
from toy_chain import REPOSITORY, TOY, make_folder, plan

IMAGENET = REPOSITORY / "experiments/imagenet.yaml"
H100 = DEVICES["h100"]


def make_work(path: Path = TOY, **changed: object) -> Work:
    """Of an experiment of which nothing is there yet."""
    experiment = load_experiment([path])
    sections = {
        name: getattr(experiment, name).model_copy(update=value)
        if isinstance(value, dict)
        else value
        for name, value in changed.items()
    }
    return find_work(experiment.model_copy(update=sections), H100, torch.bfloat16)


def hours(work: Work) -> dict[str, float]:
    return {each.rule: sum(each.seconds) for each in work.list_jobs()}


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The toy experiment with more jobs."""
    content = yaml.safe_load(TOY.read_text())
    content["data"]["shards"] = content["sampling"]["shards"] = 3
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "sharded.yaml"


@pytest.mark.parametrize("path", [TOY, REPOSITORY / "config.yaml", None])
def test_as_many_jobs_of_each_rule_as_snakemake_plans(path, sharded, tmp_path, monkeypatch):
    path = path or sharded
    make_folder(tmp_path / "fresh")
    monkeypatch.chdir(tmp_path / "fresh")
    counted = {each.rule: len(each.seconds) for each in make_work(path).list_jobs()}
    assert counted == planned(plan(Path.cwd(), "-n", config=path))


def test_of_tokens_likelihood_alone_is_planned(folder, tmp_path, monkeypatch):
    content = yaml.safe_load(TOY.read_text())
    content["data"] = {"tokens": str(folder / "results/toy/tokens.safetensors")}
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump(content))
    make_folder(tmp_path / "fresh")
    monkeypatch.chdir(tmp_path / "fresh")
    jobs = planned(plan(Path.cwd(), "-n", config=tmp_path / "tokens.yaml"))
    counted = make_work(tmp_path / "tokens.yaml").list_jobs()
    assert {each.rule: len(each.seconds) for each in counted} == jobs
    assert jobs["likelihood"] > 1
    assert not jobs.keys() & {"data", "tokenizer", "generate", "quality"}
    said = plan(Path.cwd(), "-n", "quality_table", config=tmp_path / "tokens.yaml", status=1)
    assert "data.tokens stands in place of images" in said


def test_levels_are_those_of_the_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    order = [each.rule for each in make_work().list_jobs()]
    chain = ["data", "tokenizer", "tokens", "model", "calibration", "adapt", "generate", "samples"]
    assert [rule for rule in order if rule in chain] == chain
    assert order.index("quality") < order.index("tables")


def test_time_follows_what_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    once, model = hours(make_work()), load_experiment([TOY]).model
    twice = hours(make_work(model={"steps": 2 * model.steps}))
    assert twice["model"] > once["model"]
    assert {rule for rule in once if twice[rule] != once[rule]} == {"model"}
    long = hours(make_work(sampling={"samples": 600}))
    changed = {rule for rule in once if long[rule] != once[rule]}
    assert changed == {"generate", "quality", "reference_scores"}


def test_a_training_on_several_gpus_asks_for_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one, four = (
        {each.rule: each for each in make_work(training={"gpus": gpus}).list_jobs()}
        for gpus in (1, 4)
    )
    for rule in ("tokenizer", "model", "adapt", "architecture"):
        assert (one[rule].gpus, four[rule].gpus) == (1, 4)
        assert max(four[rule].seconds) < max(one[rule].seconds)
        assert four[rule].device < one[rule].device or rule == "tokenizer"
    assert four["generate"] == one["generate"]


def test_guided_decodes_have_two_rows_of_an_image(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    once, twice = hours(make_work()), hours(make_work(sampling={"guidance": 2.0}))
    changed = {rule for rule in once if twice[rule] != once[rule]}
    assert changed == {"generate", "cost", "paper_cost", "architecture_cost"}


def test_a_tokenizer_that_is_given_is_still_judged(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    few = make_work(IMAGENET)
    tokenizer = {each.rule: each for each in few.list_jobs()}["tokenizer"]
    assert tokenizer.device > 0
    assert max(tokenizer.seconds) > 60


def test_pixels_take_no_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs = {each.rule: each for each in make_work(tokenizer={"levels": 256}).list_jobs()}
    trained = {each.rule: each for each in make_work().list_jobs()}
    assert max(jobs["tokenizer"].seconds) < max(trained["tokenizer"].seconds)
    assert max(jobs["model"].seconds) > max(trained["model"].seconds)  # of more tokens


def test_bytes_are_those_of_the_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    written = {each.rule: each.written for each in make_work().list_jobs()}
    run = folder / "results/toy"
    for rule, files in (
        ("tokens", [run / "tokens.safetensors"]),
        ("model", [run / "base/model.safetensors"]),
        ("data", [folder / "results/data/shapes.safetensors"]),
        ("samples", list(run.glob("*/samples/*.safetensors"))),
    ):
        assert written[rule] == pytest.approx(sum(each.stat().st_size for each in files), rel=0.15)


def test_operations_of_a_pass_by_hand():
    """A product of 5 × 3 on four rows: 120; of what it is given, 12 numbers are kept."""
    layer = torch.nn.Linear(3, 5, bias=False, device="meta")
    counted = count_pass(layer, torch.zeros(4, 3, device="meta"))
    assert (counted.flops, counted.kept) == (2 * 4 * 3 * 5, 4 * 4 * 3)


def test_a_device_that_is_twice_as_fast_takes_half_as_long(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    work = make_work(IMAGENET, sampling={"samples": 5_000_000})
    double = replace(H100, flops=2 * H100.flops, bandwidth=2 * H100.bandwidth, operator=1e-6)
    slow, fast = hours(work), hours(replace(work, device=double))
    assert slow["generate"] / fast["generate"] == pytest.approx(2, rel=0.1)
    assert slow["data"] == fast["data"]  # of a processor


def test_imagenet_is_planned_before_anything_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"--experiment={IMAGENET}", "--cluster=8 x h100"]) == 0
    said = capsys.readouterr().out
    assert "1281167 images of 16×16 tokens, llamagen with 111 M parameters, bfloat16" in said
    assert "| generate" in said
    hours, gigabytes = re.search(r"jobs, (\S+) hours .* on 8; (\d+) GB written", said).groups()
    pixels = 1281167 * 256**2 * 3 / 1e9  # what a data set of this size cannot do without
    assert float(hours) > 1
    assert float(gigabytes) > pixels


def test_a_profile_asks_for_more_at_each_attempt(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [f"--experiment={IMAGENET}", "--cluster=8 x h100", "--profile=profiles/imagenet"]
    assert main(["plan", *given]) == 0
    content = yaml.safe_load(Path("profiles/imagenet/profile.yaml").read_text())
    asked = content["set-resources"]
    assert content["jobs"] == 8
    assert asked["generate"]["gpu"] == 1
    assert "gpu" not in asked["tables"]
    assert all(each["runtime"].endswith("* attempt") for each in asked.values())
    most = {rule: int(each["mem_mb"].split()[0]) for rule, each in asked.items()}
    codes = 1e-6 * 1281167 * 4 * 256  # megabytes: images need not fit into memory, codes do
    assert most["tokens"] > codes > most["tokenize"]
    assert most["data"] < 2 * codes


def test_one_processor_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"--experiment={TOY}"]) == 0
    assert "on 1 x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster=many"], "--cluster: 'many' is not a number of devices, as '8 x h100'"),
        (["--cluster=8 x z80"], "unknown device 'z80'"),
        (["--shape=llamagen-b"], "give --experiment, or --shape and --cache, not both"),
    ],
)
def test_what_cannot_be_planned_is_said(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"--experiment={TOY}", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"images": None}}, "how many images 'folder' has is not known yet"),
        ({"model": {"shape": None}}, "write model.shape to plan without it"),
    ],
)
def test_what_cannot_be_known_is_said(changed, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(IMAGENET.read_text())
    for section, keys in changed.items():
        content[section] |= keys
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    assert main(["plan", "--experiment=experiment.yaml", "--cluster=8 x h100"]) == 2
    assert message in capsys.readouterr().err
