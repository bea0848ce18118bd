"""Published checkpoints, tokenizers and codes, at a tiny shape with random weights."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import restated_llamagen as restated
import torch
from PIL import Image

import fewlines
from conftest import GRID, planned, tiny_transformer
from fewlines.cli import main
from fewlines.decode.loop import generate
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_tensors
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.llamagen.checkpoint import load_checkpoint
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import SHAPES, TransformerShape
from fewlines.models.llamagen.tokenizer import LlamaGenTokenizer, LlamaGenTokenizerShape

REPOSITORY = Path(__file__).parent.parent.parent
MODEL = tiny_transformer()
CODES = np.arange(5 * 20).reshape(5, 1, 20) % 16
ROWS = "cls_embedding.embedding_table.weight"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`tiny` is a published shape of `tiny_transformer`'s sizes."""
    monkeypatch.setitem(SHAPES, "llamagen-tiny", TransformerShape(32, 2, 4, 4, 16, 1000, GRID))


def imported(path: Path, capsys, *more: str) -> tuple[int, str]:
    out = path.parent / "model.safetensors"
    options = [f"--output={out}", f"--metrics={path.parent / 'm.json'}", *more]
    return main(["import-model", f"--checkpoint={path}", *options]), capsys.readouterr().err


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = {**MODEL.state_dict(), **tensors}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in MODEL.state_dict().items()}


TOLD = Namespace(gpt_model="GPT-Tiny", image_size=64, downsample_size=16, num_classes=3, lr=1e-4)
COMPUTED = {"freqs_cis": torch.ones(20, 4, 2), "layers.1.attention.kv_cache.k_cache": torch.ones(1)}


@pytest.mark.parametrize(
    "content",
    [
        MODEL.state_dict(),
        {"model": MODEL.state_dict()},
        {"model": MODEL.state_dict(), "optimizer": {"lr": 1}, "steps": 3},
        {"state_dict": wrapped("module.")},
        {"module": wrapped("_orig_mod.module.")},
        {"model": changed(**COMPUTED)},
    ],
    ids=["weights", "model", "training", "distributed", "compiled", "old"],
)
def test_a_checkpoint_becomes_a_model_that_every_stage_reads(content, tmp_path, capsys):
    torch.save(content, tmp_path / "c2i.pt")
    code, said = imported(tmp_path / "c2i.pt", capsys)
    assert code == 0
    assert "does not say how many tokens its images have: 4×5 are taken" in said
    found = load_network(tmp_path / "model.safetensors", Transformer)
    assert found.spec == MODEL.spec
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, MODEL.state_dict()[name]), name


def test_what_the_training_script_was_told_is_read(tmp_path, capsys):
    path = tmp_path / "c2i.pt"
    torch.save({"model": MODEL.state_dict(), "optimizer": {}, "steps": 1, "args": TOLD}, path)
    assert imported(path, capsys) == (0, "")
    assert load_network(tmp_path / "model.safetensors", Transformer).spec.grid == (4, 4)
    code, said = imported(path, capsys, "--side=6")
    assert (code, "was trained on images of 4×4 tokens, not 6×6" in said) == (2, True)


def test_one_of_two_models_is_chosen(tmp_path, capsys):
    path = tmp_path / "c2i.pt"
    torch.save(
        {"model": MODEL.state_dict(), "ema": changed(**{"norm.weight": torch.ones(32) * 2})}, path
    )
    code, said = imported(path, capsys)
    assert code == 0
    assert "holds 'model' and 'ema'; 'model' is read" in said
    assert imported(path, capsys, "--part=ema", "--side=4") == (0, "")
    assert load_network(tmp_path / "model.safetensors", Transformer).norm.weight[0] == 2
    code, said = imported(path, capsys, "--part=best")
    assert "holds no 'best'; it holds model, ema" in said


def test_classes_and_the_row_of_no_class_are_told_apart(tmp_path, capsys):
    path, rows = tmp_path / "c2i.pt", MODEL.state_dict()[ROWS]
    told = Namespace(num_classes=4, image_size=64)
    torch.save({"model": MODEL.state_dict(), "args": told}, path)
    model = load_checkpoint(path)
    assert (model.spec.classes, model.has_null_class) == (4, False)
    generate(model, [3], fewlines.cache("full"))
    with pytest.raises(FewlinesError, match=r"labels must lie in 0 … 3$"):
        generate(model, [4], fewlines.cache("full"))
    with pytest.raises(FewlinesError, match="never learned to draw without a class; write 1"):
        generate(model, [3], fewlines.cache("full"), sampler=Sampler(guidance=2.0))
    torch.save({ROWS: rows[:1].repeat(1000, 1), **changed(**{ROWS: None})}, path)
    model = load_checkpoint(path, side=4)
    assert (model.spec.classes, model.has_null_class) == (1000, False)
    assert "the model cannot be guided" in capsys.readouterr().err
    torch.save({"model": MODEL.state_dict(), "args": Namespace(num_classes=9)}, path)
    with pytest.raises(FewlinesError, match="4 rows of class embeddings for 9 classes"):
        load_checkpoint(path)


def test_heads_that_no_tensor_tells_are_asked_for(tmp_path, monkeypatch):
    torch.save(MODEL.state_dict(), tmp_path / "c2i.pt")
    monkeypatch.delitem(SHAPES, "llamagen-tiny")
    with pytest.raises(FewlinesError, match="say how many heads a layer has"):
        load_checkpoint(tmp_path / "c2i.pt")
    model = load_checkpoint(tmp_path / "c2i.pt", heads=4, side=4)
    assert (model.shape.heads, model.shape.kv_heads, model.shape.hidden) == (4, 2, 96)
    with pytest.raises(FewlinesError, match="how many a side has"):
        load_checkpoint(tmp_path / "c2i.pt", heads=4)


def test_published_sizes():
    """Parameters in millions, as published."""
    for name, millions in (
        ("b", 111), ("l", 343), ("xl", 775), ("xxl", 1411), ("3b", 3097),
    ):  # fmt: skip
        with torch.device("meta"):
            model = Transformer(SHAPES[f"llamagen-{name}"].on((16, 16)))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    for name, billions in (("xxxl", 3.9), ("1b", 1.2), ("7b", 6.6)):
        with torch.device("meta"):
            model = Transformer(SHAPES[f"llamagen-{name}"].on((16, 16)))
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(**{"norm.weight": None}), r"lacks norm.weight$"),
        (changed(freqs=torch.ones(2)), r"has, beside the model's weights, freqs$"),
        (changed(**{"norm.weight": torch.ones(3)}), r"norm.weight is \(3,\), not \(32,\)"),
        (changed(**{"norm.weight": torch.full((32,), torch.nan)}), "not finite"),
        ({"model": MODEL.state_dict(), "x": Path("/")}, "is not a whole file of weights alone"),
        ({"step": 3}, "holds no weights by name"),
        (changed(**{ROWS: None}), "lacks cls_embedding.*: no model of LlamaGen's"),
    ],
)
def test_what_is_no_such_checkpoint_is_named(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "c2i.pt")
    code, said = imported(tmp_path / "c2i.pt", capsys)
    assert code == 2
    assert re.search(message, said, re.MULTILINE), said
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_greedy_tokens_are_those_of_the_restatement(kv_heads):
    model = tiny_transformer(torch.float64, kv_heads)
    weights = {name: each.double() for name, each in model.state_dict().items()}
    torch.set_default_dtype(torch.float64)
    try:
        codes = torch.tensor(CODES[:1, 0])
        known = [codes[0, :n].tolist() for n in range(20)]
        one, two, none = (restated.find_class(weights, label) for label in (1, 2, 3))
        wanted = [restated.predict(weights, 4, 5, one, each) for each in known]
        found = model.teacher_forced(torch.tensor([1]), codes)[0]
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-6)
        for scale, interval in ((1.0, -1), (4.0, -1), (4.0, 7)):
            guided = 0 if interval < 0 else interval + 2
            how = Sampler(temperature=0, guidance=scale, guided_tokens=guided)
            drawn = generate(model, [2], fewlines.cache("full"), sampler=how)
            assert drawn[0].tolist() == restated.draw(weights, 4, GRID, two, none, scale, interval)
    finally:
        torch.set_default_dtype(torch.float32)


def make_captioned() -> dict[str, torch.Tensor]:
    """The tiny model, drawn from captions of at most five features of six numbers."""
    generator = torch.Generator().manual_seed(4)
    name = "cls_embedding."
    shapes = {"cap_proj.fc1.weight": (32, 6), "cap_proj.fc2.weight": (32, 32)}
    shapes |= {"uncond_embedding": (5, 6)}
    drawn = {name + key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
    return changed(**{ROWS: None}) | drawn


def test_captions_of_equal_and_of_different_length(tmp_path, capsys):
    """As LlamaGen pads them on the left and masks the padding, in both rows of guidance."""
    weights = make_captioned()
    torch.save({"model": weights}, tmp_path / "t2i.pt")
    model = load_checkpoint(tmp_path / "t2i.pt")
    generator = torch.Generator().manual_seed(5)
    captions = [torch.randn(length, 6, generator=generator) for length in (3, 5, 3, 1)]
    for scale, first in ((7.5, 0), (1.0, 2)):
        drawn = generate(model, captions, fewlines.cache("full"),
                         sampler=Sampler(temperature=0, guidance=scale))  # fmt: skip
        for caption, codes in zip(captions[first:], drawn[first:], strict=True):
            nothing = weights["cls_embedding.uncond_embedding"][5 - len(caption) :]
            known, none = (restated.project(weights, each) for each in (caption, nothing))
            assert codes.tolist() == restated.draw(weights, 4, GRID, known, none, scale)
    few = fewlines.cache("streaming", lines=2)
    together = generate(model, captions, few, seed=2)
    alone = [generate(model, [captions[i]], few, seed=2, first=i)[0] for i in range(4)]
    assert torch.equal(together, torch.stack(alone))
    for wrong, message in (
        ([1], "captions: features of shape"),
        ([torch.ones(6, 6)], r"write \(tokens, 6\) for each image, 1 … 5 tokens"),
        ([torch.full((2, 6), torch.nan)], "features that are not finite"),
    ):
        with pytest.raises(FewlinesError, match=message):
            generate(model, wrong, few)
    with pytest.raises(FewlinesError, match="draws from features of captions"):
        model.teacher_forced(torch.tensor([1]), torch.tensor(CODES[:1, 0]))


def test_a_picture_of_captions(tmp_path, capsys):
    torch.save({"model": make_captioned(), "args": TOLD}, tmp_path / "t2i.pt")
    torch.save(make_tokenizer((1, 1, 2)).state_dict(), tmp_path / "vq.pt")
    for number, length in enumerate((2, 4)):
        np.save(
            tmp_path / f"{number}.npy", np.random.default_rng(number).normal(size=(1, length, 6))
        )
    files = [f"--checkpoint={tmp_path / 't2i.pt'}", f"--tokenizer={tmp_path / 'vq.pt'}"]
    files += [f"--output={tmp_path / 'grid.png'}", "--cache=scheduled+merge+allocated:2lines"]
    captions = [f"--captions={tmp_path / name}" for name in ("0.npy", "1.npy")]
    assert main(["draw", *files, *captions]) == 0
    assert Image.open(tmp_path / "grid.png").size == (2 * 18 + 2, 20)
    assert main(["draw", *files, "--labels=1"]) == 2
    assert "draws from captions; give --captions" in capsys.readouterr().err
    assert main(["draw", *files]) == 2
    assert "give --labels, or --captions" in capsys.readouterr().err


def make_tokenizer(multipliers: tuple[int, ...], codes: int = 16) -> LlamaGenTokenizer:
    torch.manual_seed(0)
    shape = LlamaGenTokenizerShape(3, 32, multipliers, 1, 8, codes, 4)
    return LlamaGenTokenizer(shape).eval().requires_grad_(False)


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 2)])
def test_codes_and_pixels_are_those_of_the_restatement(multipliers):
    tokenizer = make_tokenizer(multipliers)
    weights = tokenizer.state_dict()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, 16, 24), generator=generator, dtype=torch.uint8)
    found = tokenizer.encode(images)
    signed = images / 127.5 - 1
    assert torch.equal(found, torch.stack([restated.encode(weights, image) for image in signed]))
    assert len(found.unique()) > 4
    drawn = torch.stack([restated.decode(weights, each) for each in found])
    torch.testing.assert_close(tokenizer.draw_images(found), drawn, rtol=1e-4, atol=4e-5)
    pixels = (127.5 * drawn + 128).clamp(0, 255).to(torch.uint8)  # as LlamaGen's scripts do
    assert (tokenizer.decode(found).int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("multipliers", "tensors", "millions"),
    [((1, 1, 2, 2, 4), 343, 71.9), ((1, 2, 2, 4), 299, 70.2)],
)
def test_the_published_tokenizers_have_their_tensors(multipliers, tensors, millions):
    """The published file has one more, the codes that were used last, which is left out."""
    with torch.device("meta"):
        network = LlamaGenTokenizer(LlamaGenTokenizerShape(3, 128, multipliers, 2, 256, 16384, 8))
    weights = network.state_dict()
    assert len(weights) == tensors
    used = 65536
    assert round((used + sum(each.numel() for each in weights.values())) / 1e6, 1) == millions


def test_a_published_tokenizer_is_read_whole(tmp_path, capsys):
    tokenizer, path = make_tokenizer((1, 1, 2)), tmp_path / "vq.pt"
    used = {"quantize.codebook_used": torch.zeros(16)}
    mean = tokenizer.state_dict() | {"quant_conv.bias": torch.full((4,), 0.5)}
    assert tokenizer.quant_conv.bias.shape == (4,)
    torch.save({"model": tokenizer.state_dict() | used, "ema": mean}, path)
    assert (fewlines.load_tokenizer(path, part="ema").quant_conv.bias == 0.5).all()
    assert capsys.readouterr().err == ""
    found = fewlines.load_tokenizer(path)
    assert "holds 'model' and 'ema'; 'model' is read" in capsys.readouterr().err
    assert found.shape == tokenizer.shape
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    save_network(tmp_path / "ours.safetensors", tokenizer)
    with pytest.raises(FewlinesError, match="is a tokenizer of ours, without parts"):
        fewlines.load_tokenizer(tmp_path / "ours.safetensors", part="ema")
    write_tensors(tmp_path / "vq.safetensors", tokenizer.state_dict())
    assert fewlines.load_tokenizer(tmp_path / "vq.safetensors").shape == tokenizer.shape
    for wrong, message in (
        ({"x": torch.ones(2)}, "lacks encoder.conv_in.weight: no tokenizer"),
        (tokenizer.state_dict() | {"loss": torch.ones(1)}, "has, beside the model's weights, loss"),
    ):
        torch.save(wrong, path)
        with pytest.raises(FewlinesError, match=message):
            fewlines.load_tokenizer(path)


@pytest.fixture
def published(tmp_path) -> Path:
    torch.save({"model": MODEL.state_dict(), "args": TOLD}, tmp_path / "c2i.pt")
    torch.save({"model": make_tokenizer((1, 1, 2)).state_dict()}, tmp_path / "vq.pt")
    return tmp_path


def drawn(
    folder: Path, capsys, *more: str, cache: str = "scheduled+merge:2lines"
) -> tuple[int, str]:
    files = [f"--checkpoint={folder / 'c2i.pt'}", f"--tokenizer={folder / 'vq.pt'}"]
    given = ["draw", *files, "--labels=2,0", f"--cache={cache}", f"--output={folder / 'grid.png'}"]
    code = main([*given, *more])
    return code, "".join(capsys.readouterr())


def test_one_command_makes_a_picture_of_a_published_model(published, capsys):
    code, said = drawn(published, capsys, "--count=3")
    assert code == 0
    assert "calibrated on 16 images that are drawn first" in said
    assert "keys and values a row, where a full cache keeps" in said
    picture = Image.open(published / "grid.png")
    assert picture.size == (3 * 18 + 2, 2 * 18 + 2)  # images of 16 pixels, two between them
    facts = json.loads(picture.info["fewlines"])
    said_of = (facts["drawn"], facts["cache"], facts["guidance"])
    assert said_of == ("2,0", "scheduled+merge-2lines", 4)
    before = (published / "grid.png").read_bytes()
    assert drawn(published, capsys, "--count=3")[0] == 0
    assert (published / "grid.png").read_bytes() == before


@pytest.mark.parametrize("page", ["README.md", "docs/public-models.md"])
def test_the_command_of_the_pages_makes_a_picture(published, monkeypatch, capsys, page):
    (line,) = re.findall(r"^fewlines (draw .*)$", (REPOSITORY / page).read_text(), re.MULTILINE)
    for written, here in (
        ("c2i_B_256", "c2i"), ("vq_ds16_c2i", "vq"), ("207,360", "2,0"), ("4lines", "2lines"),
    ):  # fmt: skip
        assert written in line
        line = line.replace(written, here)
    monkeypatch.chdir(published)
    assert main(shlex.split(line)) == 0
    assert Image.open("grid.png").size == (2 * 18 + 2, 18 + 2)


def test_the_picture_is_of_what_generate_draws(published, capsys):
    assert drawn(published, capsys, "--seed=5", cache="streaming:2lines")[0] == 0
    model = fewlines.load_model(published / "c2i.pt")
    tokenizer = fewlines.load_tokenizer(published / "vq.pt")
    cache = fewlines.cache("streaming", lines=2)
    codes = generate(model, [2, 0], cache, 5, sampler=Sampler(top_k=2000, guidance=4.0))
    images = tokenizer.decode(codes.unflatten(1, model.spec.grid))
    pixels = np.asarray(Image.open(published / "grid.png"))
    assert np.array_equal(pixels[2:18, 20:36], images[1].permute(1, 2, 0).numpy())


def test_the_pages_lines_run(published, monkeypatch):
    page = (REPOSITORY / "docs/public-models.md").read_text()
    (code,) = re.findall(r"```python\n(model = fewlines.*?)```", page, re.DOTALL)
    for written, here in (
        ("c2i_B_256", "c2i"), ("vq_ds16_c2i", "vq"), ("side=16", "side=4"), ("207, 360", "2, 0"),
        ("lines=4", "lines=2"),
    ):  # fmt: skip
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(published)
    names = {"fewlines": fewlines}
    exec(code, names)
    assert names["images"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("cache", ["full", "scheduled+merge+allocated:2lines", "line_ar:2lines"])
def test_every_kind_of_cache_draws(published, capsys, cache):
    assert drawn(published, capsys, cache=cache)[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--labels=dog"], "labels: 'dog' is not class numbers such as 207,360"),
        (["--labels=9"], "labels must lie in 0 … 3 (3: no class)"),
        (["--cache=lru:3lines"], "unknown policy 'lru'"),
        (["--output=grid.jpg"], "write one that ends in .png"),
        (["--checkpoint=nowhere.pt"], "No such file"),
        (["--temperature=-1"], "sampler: temperature"),
        (["--precision=int8"], "'int8' is not one of"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(published, capsys, more, message):
    code, said = drawn(published, capsys, *more)
    assert code == 2
    assert message in said
    assert "draw for calibration" not in said
    assert not (published / "grid.png").exists()


def test_a_tokenizer_of_other_codes_is_refused(published, capsys):
    torch.save(make_tokenizer((1, 1, 2), codes=8).state_dict(), published / "vq.pt")
    code, said = drawn(published, capsys)
    assert (code, "has 8 codes" in said) == (2, True)


@pytest.fixture
def three_classes(monkeypatch):
    """Codes are of `tiny_transformer`'s three classes, and not of ImageNet's."""
    shape = TransformerShape(32, 2, 4, 4, 16, 3, GRID)
    monkeypatch.setattr(TransformerShape, "on", lambda self, grid: shape)


def test_folders_of_extracted_codes_become_tokens(tmp_path, three_classes, capsys):
    """A file for each image with its crops, by numbers that are not the order of their names."""
    crops = np.arange(12 * 2 * 20).reshape(12, 2, 20) % 16
    for number, codes in enumerate(crops):
        for name, content in (("codes", codes[None]), ("labels", np.array([number % 3]))):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{number}.npy", content)

    def run(*more: str) -> tuple[int, str]:
        files = [
            f"--{split}-{name}={tmp_path / name}"
            for split in ("train", "test")
            for name in ("codes", "labels")
        ]
        out = f"--output={tmp_path / 'tokens.safetensors'}"
        code = main(["import-tokens", *files, "--shape=llamagen-tiny", "--grid=4", out, *more])
        return code, capsys.readouterr().err

    assert run() == (0, "")
    tensors, _ = read_tensors(tmp_path / "tokens.safetensors")
    assert tensors["train_codes"].tolist() == [crops[i, i % 2].tolist() for i in range(12)]
    assert tensors["train_labels"].tolist() == [i % 3 for i in range(12)]
    assert run("--crop=1") == (0, "")
    tensors, _ = read_tensors(tmp_path / "tokens.safetensors")
    assert tensors["test_codes"].tolist() == crops[:, 1].tolist()
    code, said = run("--crop=2")
    assert (code, "has 2 crops of an image, from 0" in said) == (2, True)
    (tmp_path / "labels/11.npy").rename(tmp_path / "labels/12.npy")
    code, said = run()
    assert (code, "11.npy is in one of" in said) == (2, True)


def test_codes_become_tokens_and_wrong_ones_are_named(tmp_path, three_classes, capsys):
    np.save(tmp_path / "codes.npy", CODES)
    np.save(tmp_path / "labels.npy", np.arange(5) % 3)

    def run(codes: str = "codes", labels: str = "labels") -> tuple[int, str]:
        files = {"codes": codes, "labels": labels}
        options = [
            f"--{split}-{name}={tmp_path / file}.npy"
            for split in ("train", "test")
            for name, file in files.items()
        ]
        options += [
            "--shape=llamagen-tiny",
            "--grid=4",
            f"--output={tmp_path / 'tokens.safetensors'}",
        ]
        return main(["import-tokens", *options]), capsys.readouterr().err

    assert run() == (0, "")
    tensors, header = read_tensors(tmp_path / "tokens.safetensors")
    assert tensors["test_codes"].tolist() == CODES[:, 0].tolist()
    assert header == {"grid": list(GRID), "codes": 16, "classes": 3}
    np.save(tmp_path / "short.npy", CODES[..., :9])
    np.save(tmp_path / "large.npy", CODES + 1)
    (tmp_path / "text.npy").write_text("codes")
    np.savez(tmp_path / "several.npz", CODES)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    np.save(tmp_path / "halves.npy", CODES.astype(np.float16))
    np.save(tmp_path / "words.npy", CODES.astype(str).astype("<U1"))
    for wrong, message in (
        ("short", "has 9 codes an image"),
        ("large", "must lie in 0 … 15"),
        ("text", "text.npy is not a .npy file of numbers"),
        ("several", "holds several arrays; save one"),
        ("halves", "holds float16 of shape"),
        ("words", "holds <U1 of shape"),
        ("nowhere", "No such file"),
    ):
        code, said = run(codes=wrong)
        assert code == 2
        assert message in said
    assert run(labels="codes")[0] == 2


def test_the_recipe_plans_without_images_or_a_tokenizer(tmp_path):
    for name in ("Snakefile", "workflow", "profiles", "config.yaml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "llamagen").mkdir()
    for name in ("tokens.safetensors", "c2i_B_256.pt"):
        (tmp_path / "llamagen" / name).touch()
    recipe = str(REPOSITORY / "experiments/llamagen.yaml")
    command = [str(Path(sys.executable).parent / "snakemake"), "-n", "likelihood_table"]
    done = subprocess.run(
        [*command, "--configfile", recipe], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = planned(done.stdout + done.stderr)
    assert set(jobs) == {"model", "calibration", "adapt", "likelihood", "likelihood_table"}
