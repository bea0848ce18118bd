"""What a user sees who gives the wrong thing: one clear sentence, exit code 2, nothing written."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewlines
from conftest import tiny_transformer
from fewlines.calibration.data import Calibration
from fewlines.cli import main
from fewlines.config import validate_experiment
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.models.checkpoint import save_network
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape

FULL = {"policy": "full"}
LINES = {"policy": "lines", "budget": {"lines": 3}}
ADAPTED = {"adapted": {"caches": ["full"]}}

CONFIGURATIONS = [
    ({"modle": {}}, "modle: unknown key; did you mean 'model'"),
    ({"model": {"widht": 3}}, "model.widht: unknown key; known keys: family, checkpoint"),
    ({"model": {"dim": "wide"}}, "model.dim: .*integer.*'wide'"),
    ({"model": {"heads": 5}}, "model: dim 192 / heads 5 must be a multiple of 4"),
    ({"model": {"heads": 3, "kv_heads": 2}}, "kv_heads 2 must divide heads 3"),
    ({"model": {"steps": 0}}, "model.steps: .*greater than 0"),
    ({"model": {"warmup": -1}}, "model.warmup: .*greater than or equal to 0"),
    ({"model": {"class_dropout": 1.5}}, "model.class_dropout: .*less than or equal to 1"),
    ({"model": {"muon_rate": 0}}, "model.muon_rate: .*greater than 0"),
    ({"tokenizer": {"codes": 1}}, "tokenizer.codes: .*greater than 1"),
    ({"tokenizer": {"widths": [0]}}, "tokenizer.widths.0: .*greater than 0"),
    ({"caches": []}, "caches: .*at least 1 item"),
    ({"caches": [{"policy": "ful"}]}, "caches.0: unknown policy 'ful'; there are corrected"),
    ({"caches": [{"policy": "lines"}]}, "caches.0: cache: lines needs a budget"),
    ({"caches": [{"policy": "full", "merge": True}]}, "leave out budget and merge"),
    ({"caches": [{"policy": "lines", "budget": {"lines": 0}}]}, "caches.0.budget: .*above 0"),
    ({"caches": [{"policy": "lines", "budget": {"lines": -2}}]}, "caches.0.budget: .*above 0"),
    (
        {"caches": [{"policy": "lines", "budget": {"fraction": "3/2"}}]},
        "3/2 is more than the image",
    ),
    ({"caches": [{"policy": "lines", "budget": {"tokens": 1.5}}]}, "not a whole number of tokens"),
    ({"caches": [{"policy": "lines", "budget": {"rows": 2}}]}, "lines, fraction, tokens"),
    ({"caches": [{"policy": "lines", "budget": 3}]}, r"budget: 3 is not one of \{lines: 3\}"),
    ({"caches": [{"policy": "lines", "budgets": {}}]}, "unknown key; did you mean 'budget'"),
    ({"caches": [{**FULL, "options": {"sinks": 1}}]}, "does not take sinks; its options: none"),
    (
        {"caches": [FULL, {"policy": "tova", "budget": {"lines": 1}, "options": {"every": -1}}]},
        "tova: every: .*greater than or equal to 0",
    ),
    (
        {
            "adaptation": {
                "models": {"adapted": {"caches": ["full"], "trained": "norms", "rank": 4}}
            }
        },
        "rank: 4 updates matrices alone",
    ),
    (
        {"caches": [FULL, {**LINES, "allocation": "mass"}]},
        "lines has no schedule to weigh heads by",
    ),
    (
        {"caches": [FULL, {**LINES, "allocation": "calibrated"}]},
        "measured with the schedule's victims",
    ),
    (
        {"caches": [FULL, {**LINES, "policy": "corrected", "merge": True, "allocation": "bands"}]},
        "corrected has one merge slot in each head; write 'allocation: calibrated'",
    ),
    (
        {"caches": [FULL, {**LINES, "allocation": "even"}]},
        "unknown allocation 'even'; there are ada, bands",
    ),
    (
        {"caches": [FULL, {**LINES, "measure": "fid"}]},
        "caches.1.measure: .*'likelihood', 'samples' or 'all'",
    ),
    ({"caches": [FULL, FULL]}, "full is listed more than once"),
    ({"paper": {"caches": ["lins-3lines"]}}, "paper.caches.0: unknown policy 'lins'; there are"),
    ({"paper": {"caches": ["full"]}}, "paper: caches: the full cache stands in it anyway"),
    ({"paper": {"cache": "lines-3lines"}}, "paper.cache: unknown key; did you mean 'caches'"),
    ({"paper": {"caches": ["lines+merged-3lines"]}}, "after a plus stands one of merge, ada"),
    (
        {
            "model": {"family": "hierarchical"},
            "tasks": {"completion": {"prompt_lines": 2, "caches": ["full"]}},
        },
        "tasks.completion.prompt_lines: hierarchical does not draw line by line",
    ),
    ({"architectures": {"cnn": {"channels": 8}}}, "architectures.cnn: write a family and its keys"),
    (
        {"architectures": {"cnn": {"family": "cnn"}}},
        "architectures.cnn: unknown model family 'cnn'",
    ),
    (
        {"architectures": {"cnn": {"family": "pixelcnn", "kernel": 4}}},
        "kernel: write an odd number",
    ),
    (
        {"architectures": {"rnn": {"family": "pixelrnn", "variant": "column"}}},
        "architectures.rnn: variant: .*'row' or 'diagonal'",
    ),
    (
        {"architectures": {"net": {"family": "gated-deltanet", "dim": 10}}},
        "architectures.net: heads 3 must divide dim 10",
    ),
    (
        {"architectures": {"sparse": {"family": "sparse-transformer", "heads": 1}}},
        "architectures.sparse: heads: one reads what is near, one what is far",
    ),
    (
        {"architectures": {"cnn": {"family": "pixelcnn", "start": "base.safetensors"}}},
        "architectures.cnn: it is trained here, from nothing; leave out checkpoint and start",
    ),
    (
        {"architectures": {"tables": {"family": "pixelcnn"}}},
        "'tables' is the name of something else",
    ),
    ({"adaptation": {"models": {"mine": {}}}}, "adaptation.models.mine.*should match pattern"),
    ({"adaptation": {"models": {"adapted": {"caches": []}}}}, "caches: .*at least 1 item"),
    (
        {"adaptation": {"models": {"adapted": {"caches": ["lins-9lines"]}}}},
        "adaptation.models.adapted.caches.0: unknown policy 'lins'",
    ),
    (
        {"adaptation": {"models": {"adapted": {"caches": ["full"], "trained": "lora"}}}},
        "trained: 'lora' is not one of all, attention, norms",
    ),
    ({"adaptation": {"step": 3, "models": ADAPTED}}, "adaptation.step: .*did you mean 'steps'"),
    ({"data": {"source": "mnist"}}, "data.source: unknown data source 'mnist'; there are"),
    ({"adaptation": {"models": False}}, "adaptation.models: .*dictionary"),
    ({"precision": "fp16"}, "precision: .*'auto', 'float32' or 'bfloat16'"),
    ({"storage": "int8"}, "storage: .*'float32', 'float16' or 'bfloat16'"),
    ({"sampling": {"samples": 10}}, "kid_subset_size: must not exceed"),
    (
        {"tasks": {"c": {"prompt_lines": 2, "caches": ["lins-9lines"]}}},
        "tasks.c.caches.0: unknown policy 'lins'",
    ),
    (
        {"tasks": {"c": {"prompt_lines": -1, "caches": ["full"]}}},
        "tasks.c.prompt_lines: .*greater than or equal",
    ),
    (
        {"tasks": {"g": {"model": "adaptd", "guidance": 2.0, "caches": ["full"]}}},
        "tasks.g.model: adaptd is not base or one of adaptation.models",
    ),
    (
        {"tasks": {"u": {"labelled": False, "guidance": 2.0, "caches": ["full"]}}},
        "tasks.u: guidance needs a class",
    ),
    (
        {"tasks": {"u": {"labelled": False, "caches": ["full"]}}, "sampling": {"guidance": 2.0}},
        "tasks.u: guidance needs a class",
    ),
    ({"model": {"side": 16}}, "model: shape, side and part are of a checkpoint"),
    ({"model": {"shape": "llamagen-q"}}, "model: unknown shape 'llamagen-q'; there are"),
    ({"quality": {"features": "vgg"}}, "quality.features: .*'efficientnet-lite0' or 'inception'"),
    ({"sampling": {"shards": 2000}}, "sampling.shards: must not exceed sampling.samples"),
    ({"sampling": {"seeds": []}}, "sampling.seeds: .*at least 1 item"),
    ({"sampling": {"top_p": 0}}, "sampling.top_p: .*greater than 0"),
    ({"sampling": {"temperature": -1}}, "sampling.temperature: .*greater than or equal to 0"),
    ({"sampling": {"guidance": -1}}, "sampling.guidance: .*greater than or equal to 0"),
    ({"name": "a/b"}, "name: .*should match pattern"),
    ({"name": "reference"}, "results/reference is not a run's"),
    (
        {"model": {"family": "llama"}},
        "unknown model family 'llama'; there are gated-deltanet, hierarchical, llamagen",
    ),
    ({"efficiency": {"runs": [{"shape": "gpt"}]}}, "unknown shape 'gpt'; there are"),
]


OLD_NAMES = [
    ({"caches": [{**LINES, "fold": True}]}, "caches.0.fold: 'fold' is called 'merge' now"),
    (
        {"caches": [{**LINES, "split": "mass"}]},
        "caches.0.split: 'split' is called 'allocation' now",
    ),
    ({"caches": [{**LINES, "policy": "linear"}]}, "policy: 'linear' is called 'line_ar' now"),
    (
        {"caches": [{**LINES, "allocation": "summaries"}]},
        "allocation: 'summaries' is called 'bands' now",
    ),
    (
        {"paper": {"caches": ["scheduled+fold+budgets-3lines"]}},
        "'scheduled.fold.budgets-3lines' is called 'scheduled.merge.allocated-3lines' now",
    ),
    (
        {"adaptation": {"models": {"adapted": {"caches": ["full", "linear+fold-2lines"]}}}},
        "adaptation.models.adapted.caches.1: .* is called 'line_ar.merge-2lines' now",
    ),
    ({"tasks": {"c": {"given": 2, "caches": ["full"]}}}, "'given' is called 'prompt_lines' now"),
    ({"calibration": {"carried": "c"}}, "'carried' is called 'transferred' now"),
]


@pytest.mark.parametrize(("content", "message"), OLD_NAMES)
def test_old_names_are_refused_with_the_new_ones(content, message):
    with pytest.raises(FewlinesError, match=message):
        validate_experiment(content)


def test_what_a_user_names_may_be_called_as_a_key_once_was():
    content = {
        "tasks": {"given": {"labelled": False, "caches": ["full"]}},
        "architectures": {"split": {"family": "pixelcnn"}},
    }
    assert set(validate_experiment(content).tasks) == {"given"}


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS)
def test_every_wrong_key_is_named_with_what_is_allowed(content, message):
    with pytest.raises(FewlinesError, match=message):
        validate_experiment(content)


@pytest.fixture
def files(tiny_files) -> Path:
    """A tiny model, tokens that fit it, and much that does not."""
    tmp_path = tiny_files
    (tmp_path / "misspelt").write_text((tmp_path / "config").read_text() + "smapling: {}\n")
    (tmp_path / "list").write_text("- 1\n")
    (tmp_path / "broken").write_text("a: [\n")
    model = tiny_transformer()
    whole = (tmp_path / "model").read_bytes()
    (tmp_path / "truncated").write_bytes(whole[:-100])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(pickle.dumps(print))
    save_network(tmp_path / "tokenizer", ConvTokenizer(TokenizerShape(1, (4,), 0, 8, 4)))
    weights = model.state_dict()
    header = {"kind": "llamagen", "shape": vars(model.shape)}
    name = "layers.1.attention.wo.weight"
    spoilt = {
        "nan": {**weights, name: weights[name] * torch.nan},
        "less": {key: tensor for key, tensor in weights.items() if key != name},
        "more": {**weights, "layers.9.extra": torch.zeros(1)},
        "smaller": {**weights, name: weights[name][:2]},
    }
    for spoiled, tensors in spoilt.items():
        write_tensors(tmp_path / spoiled, tensors, header)
    write_tensors(tmp_path / "shapeless", weights, {"kind": "llamagen", "shape": {"dim": 3}})
    write_tensors(tmp_path / "foreign", weights)
    tokens, _ = read_tensors(tmp_path / "tokens")
    write_tensors(tmp_path / "wide", tokens, {"grid": (5, 4), "codes": 16, "classes": 3})
    write_tensors(tmp_path / "rich", tokens, {"grid": (4, 5), "codes": 512, "classes": 3})
    attention = np.zeros((2, 3, 20, 20), np.float32)
    Calibration(attention, (4, 5), images=1).save(tmp_path / "calibration")
    return tmp_path


FILES = [
    ({"config": "nowhere"}, "nowhere does not exist"),
    ({"config": "list"}, "list must hold keys such as 'caches:'"),
    ({"config": "broken"}, "broken, line 2 is not valid YAML"),
    ({"config": "misspelt"}, "smapling: unknown key; did you mean 'sampling'?"),
    ({"cache": "lines-9lines"}, "no cache 'lines-9lines' in this experiment; it has full, "),
    ({"cache": "scheduled-1lines"}, "scheduled needs a calibration of this model; 'fewlines cal"),
    (
        {"cache": "scheduled-1lines", "calibration": "calibration"},
        "measured for 2 layers of 3 heads on a 4×5 grid, but the model has 2 of 2 on 4×5",
    ),
    (
        {"cache": "scheduled-1lines", "calibration": "tokens"},
        "tokens is not a calibration; 'fewlines calibrate' writes one",
    ),
    ({"model": "missing"}, "missing does not exist; run the stage that writes it first"),
    ({"model": "truncated"}, "truncated is not a complete safetensors file"),
    ({"model": "empty"}, "empty is not a complete safetensors file"),
    ({"model": "pickle"}, "pickle is not a complete safetensors file"),
    ({"model": "tokenizer"}, "tokenizer holds a tokenizer, not a model"),
    ({"model": "foreign"}, "foreign does not say what network it holds"),
    ({"model": "shapeless"}, "shapeless does not say which llamagen it holds"),
    ({"model": "nan"}, "layers.1.attention.wo.weight is not finite everywhere"),
    ({"model": "less"}, "less: weights of another architecture (Missing key(s)"),
    ({"model": "more"}, "more: weights of another architecture (Unexpected key(s)"),
    ({"model": "smaller"}, "smaller: weights of another architecture (size mismatch"),
    ({"tokens": "model"}, "model is not a file of tokens"),
    (
        {"tokens": "wide"},
        "holds 5×4 tokens of 16 codes in 3 classes, but the model was made for 4×5",
    ),
    ({"tokens": "rich"}, "holds 4×5 tokens of 512 codes in 3 classes"),
    ({"output": "model/out.json"}, "model: File exists"),
]


@pytest.mark.parametrize(("wrong", "message"), FILES)
def test_a_wrong_file_is_one_sentence_and_leaves_nothing(files, capsys, wrong, message):
    given = {
        "config": "config",
        "model": "model",
        "tokens": "tokens",
        "output": "out.json",
        **wrong,
    }
    cache = given.pop("cache", "lines-1lines")
    options = [f"--{name}={files / file}" for name, file in given.items()]
    before = set(files.iterdir())
    assert main(["measure-likelihood", f"--cache={cache}", *options]) == 2
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if not line.startswith("likelihood:")]  # progress
    assert error[0].startswith("fewlines: ")
    assert message in "\n".join(error)
    assert len(error) == 1 + ("misspelt" in wrong.values())
    assert set(files.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "tables --threads 0 --config c --run r",
            "'--threads': Input should be greater than or equal to 1",
        ),
        (
            "plan --shape llamagen-b --cache full --batch 0",
            "'--batch': Input should be greater than or equal to 1",
        ),
        (
            "plan --shape llamagen-b --cache full --grid -4",
            "'--grid': Input should be greater than or equal to 1",
        ),
        ("plan --shape llamagen-b --cache full --precision half", "'half' is not one of"),
        ("plan --cache full", "give --shape and --cache, or --experiment"),
        ("generate --shard -1", "'--shard': Input should be greater than or equal to 0"),
        ("train-modle", "No such command 'train-modle'"),
    ],
)
def test_options_have_types_and_ranges(capsys, command, message):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3 + 1],), {}, "labels must lie in 0 … 3"),
        (([-1],), {}, "labels must lie in 0 … 3"),
        (([0],), {"prompt": torch.zeros(1, 21, dtype=torch.long)}, "an image has 20 tokens"),
        (([0],), {"prompt": torch.zeros(2, 5, dtype=torch.long)}, "there are 1 labels"),
    ],
)
def test_what_cannot_be_drawn_is_explained(model, arguments, options, message):
    with pytest.raises(FewlinesError, match=message):
        fewlines.generate(model, *arguments, fewlines.cache("full"), **options)


def test_the_cases_are_many():
    assert len(CONFIGURATIONS) + len(FILES) >= 60


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """On a tmpfs of a few kilobytes, where that can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        code = (
            "import sys, torch; from pathlib import Path; from fewlines.files import write_tensors;"
            f"write_tensors(Path({str(small)!r}) / 'weights', {{'w': torch.zeros(100_000)}})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0
        assert re.search("No space left|os error 28", done.stderr)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
