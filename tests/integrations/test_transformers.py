"""Models of transformers under a cache of a few lines: tiny and random, but of the true build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

import fewlines
from conftest import CACHES, GRID, tiny_transformer
from fewlines.cache.schedule import Schedule
from fewlines.cli import main
from fewlines.decode.loop import generate
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.integrations.huggingface import generate_codes, make_llama
from fewlines.integrations.transformers import FewLinesCache, make_guidance

REPOSITORY = Path(__file__).parent.parent.parent
N = GRID[0] * GRID[1]
LABELS = [0, 1, 2]
SIDE = 4  # of the images of the tiny Janus and Emu3
TEXT = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def randomise(model):
    """Larger than at the start of training: attention must matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def janus() -> JanusForConditionalGeneration:
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "num_image_tokens": SIDE * SIDE, "projection_dim": 32,
    }  # fmt: skip
    vq = {
        "embed_dim": 4, "num_embeddings": 24, "latent_channels": 8, "num_patches": SIDE,
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        "projection_dim": 32, "image_token_embed_dim": 32,
    }  # fmt: skip
    config = JanusConfig(
        text_config=LlamaConfig(**TEXT), vision_config=vision, vq_config=vq, image_token_id=5
    )
    model = randomise(JanusForConditionalGeneration(config))
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, guidance_scale=5, generation_kwargs={"boi_token_id": 6}
    )
    return model


@pytest.fixture(scope="module")
def emu3() -> Emu3ForConditionalGeneration:
    vq = {
        "codebook_size": 20, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [2],
    }  # fmt: skip
    words = {f"<|visual token {code:06d}|>": 10 + code for code in range(20)}
    words |= {"<|extra_200|>": 30, "<image>": 31}
    config = Emu3Config(text_config={**TEXT, "rope_theta": 1e4}, vq_config=vq, vocabulary_map=words)
    return randomise(Emu3ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**TEXT)))


def prompts(*lengths: int, bos: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[-length:] = torch.randint(7, 40, (length,), generator=generator)
        row[-length], row[-1] = bos, 6
    return ids, (ids != 0).long()


def draw_janus(model, ids, mask, cache) -> torch.Tensor:
    how = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": False}
    return model.generate(ids, attention_mask=mask, cache=cache, **how)


def draw_text(model, ids, mask, cache, tokens: int = SIDE * SIDE) -> torch.Tensor:
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, attention_mask=mask, cache=cache, **how)[:, ids.shape[1] :]


# Equal to our own engine.


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.slug)
def test_tokens_are_those_of_our_own_engine(model, cache):
    """Every policy, merged or dropped, uniform or allocated: queries in groups of two."""
    ours = generate(model, LABELS, cache, sampler=Sampler(temperature=0))
    llama = make_llama(model)
    prefix = model.embed_labels(torch.tensor(LABELS))
    theirs = FewLinesCache(llama, cache, grid=GRID)
    assert torch.equal(generate_codes(llama, prefix, N, theirs), ours)
    assert theirs.bytes == model.count_bytes(cache, len(LABELS), torch.float32)
    assert theirs.bytes == theirs.count_bytes(1, len(LABELS), torch.float32)


@pytest.mark.parametrize("cache", CACHES[1::5], ids=lambda cache: cache.slug)
def test_queries_of_their_own(cache):
    model = tiny_transformer(kv_heads=4)
    if cache.calibration is not None:
        many = np.repeat(cache.calibration.attention, 2, axis=1)
        cache = replace(cache, calibration=replace(cache.calibration, attention=many, curves=None))
        if "losses" in cache.requires:
            return
    ours = generate(model, LABELS, cache, sampler=Sampler(temperature=0))
    llama, prefix = make_llama(model), model.embed_labels(torch.tensor(LABELS))
    assert torch.equal(
        generate_codes(llama, prefix, N, FewLinesCache(llama, cache, grid=GRID)), ours
    )


# Equal to transformers' own cache, where nothing has to go.


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o"])
def test_a_budget_of_everything_is_the_stock_cache(janus, llama, policy):
    budget = {} if policy == "full" else {"lines": SIDE}
    ids, mask = prompts(5, 5)
    theirs = draw_janus(janus, ids, mask, DynamicCache(config=janus.config.text_config))
    assert torch.equal(draw_janus(janus, ids, mask, FewLinesCache(janus, policy, **budget)), theirs)
    theirs = draw_text(llama, ids, mask, DynamicCache(config=llama.config))
    ours = FewLinesCache(llama, policy, grid=(SIDE, SIDE), **budget)
    assert torch.equal(draw_text(llama, ids, mask, ours), theirs)


def test_emu3_with_both_branches_bounded(emu3):
    """An end-of-line token in each line, three tokens after the image, guidance by a branch of its
    own."""
    ids, mask = prompts(5, 5)
    grid, width = (SIDE, SIDE + 1), SIDE + 1
    tokens = SIDE * width + 3
    without = torch.tensor([[1, 9]]).repeat(2, 1)

    def allowed(_: int, so_far: torch.Tensor) -> list[int]:
        place = len(so_far) - 5
        if place >= SIDE * width:
            return [[32], [2], [0]][place - SIDE * width]
        return [30] if place % width == SIDE else list(range(10, 30))

    def draw(cache, guidance) -> torch.Tensor:
        how = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        how |= {"prefix_allowed_tokens_fn": allowed, "logits_processor": guidance}
        return emu3.generate(ids, attention_mask=mask, cache=cache, **how)[:, 5:]

    def guided(conditional, unconditional) -> torch.Tensor:
        processor = make_guidance(emu3, 2.0, without, torch.ones_like(without), unconditional)
        return draw(conditional, LogitsProcessorList([processor]))

    stock = [DynamicCache(config=emu3.config.text_config) for _ in range(2)]
    theirs = guided(*stock)
    whole = [FewLinesCache(emu3, "streaming", grid=grid, lines=SIDE) for _ in range(2)]
    assert torch.equal(guided(*whole), theirs)
    few = [FewLinesCache(emu3, "streaming", grid=grid, lines=2, merge=True) for _ in range(2)]
    drawn = guided(*few)
    assert not torch.equal(drawn, theirs)
    assert (drawn[:, SIDE::width][:, :SIDE] == 30).all()
    assert few[0].bytes < whole[0].bytes / 1.4
    assert few[1].bytes == few[1].count_bytes(2, 2, torch.float32)


# Prompts.


@pytest.mark.parametrize(
    "cache",
    [
        fewlines.cache("streaming", lines=2),
        fewlines.cache("streaming", lines=2, merge=True),
        fewlines.cache("h2o", lines=2, merge=True),
        fewlines.cache("snapkv", lines=2),
        fewlines.cache("line_ar", lines=2, anchor=1, pool="query"),
        fewlines.cache("full"),
    ],
    ids=lambda cache: cache.slug,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_of_mixed_length_are_drawn_as_each_alone(llama, janus, cache, dtype):
    """Padding is on the left and nobody looks at it, in the compiled kernel and by torch."""
    llama, janus = (make(type(x), x, dtype) for x, make in ((llama, recast), (janus, recast)))
    ids, mask = prompts(3, 7, 5)
    together = draw_text(llama, ids, mask, FewLinesCache(llama, cache, grid=(SIDE, SIDE)))
    for row, length in enumerate((3, 7, 5)):
        one = ids[row : row + 1, -length:]
        alone = FewLinesCache(llama, cache, grid=(SIDE, SIDE))
        assert torch.equal(draw_text(llama, one, torch.ones_like(one), alone)[0], together[row])
    together = draw_janus(janus, ids, mask, FewLinesCache(janus, cache))
    for row, length in enumerate((3, 7, 5)):
        one = ids[row : row + 1, -length:]
        alone = draw_janus(janus, one, torch.ones_like(one), FewLinesCache(janus, cache))
        assert torch.equal(alone[0], together[row])


def recast(cls, model, dtype):
    if dtype == torch.float32:
        return model
    twin = cls(model.config).to(dtype)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(llama, dtype):
    """Storage halves, and the first tokens are those of the stock cache in that precision."""
    twin = recast(LlamaForCausalLM, llama, dtype)
    ids, mask = prompts(5, 5)
    ours = FewLinesCache(twin, "streaming", grid=(SIDE, SIDE), lines=2)
    drawn = draw_text(twin, ids, mask, ours)
    theirs = draw_text(twin, ids, mask, DynamicCache(config=twin.config))
    assert ours.bytes == ours.count_bytes(5, 2, dtype)
    assert ours.bytes * 2 == ours.count_bytes(5, 2, torch.float32)
    assert torch.equal(drawn[:, :4], theirs[:, :4])


def test_a_cache_serves_again_after_a_reset(llama):
    ids, mask = prompts(5, 4)
    cache = FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2)
    first = draw_text(llama, ids, mask, cache)
    cache.reset()
    assert torch.equal(draw_text(llama, ids, mask, cache), first)


def test_other_caches_are_left_alone(llama):
    ids, mask = prompts(5, 3)
    before = draw_text(llama, ids, mask, None)
    FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2)
    assert llama.config._attn_implementation == "fewlines"
    assert torch.equal(draw_text(llama, ids, mask, None), before)


def test_the_readmes_lines_draw(janus):
    page = (REPOSITORY / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from fewlines.integrations.*?)```", page, re.DOTALL)
    ids, mask = prompts(5)
    names = {"model": janus}
    names["inputs"] = {"inputs": ids, "attention_mask": mask, "guidance_scale": 2.0}
    exec(code.replace("lines=4", "lines=2"), names)
    assert names["cache"].get_seq_length() == 5 + SIDE * SIDE - 1


# Refused.


def refuse(pattern: str):
    return pytest.raises(FewlinesError, match=pattern)


@pytest.mark.parametrize(
    ("found", "message"),
    [("5.23.4", "transformers 5.23.4 is too old for FewLinesCache"), (None, "needs transformers")],
)
def test_other_versions_are_refused_as_it_is_imported(monkeypatch, found, message):
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    place = REPOSITORY / "src/fewlines/integrations/transformers.py"
    spec = importlib.util.spec_from_file_location("again", place)
    with refuse(message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_attention_that_was_set_later_is_noticed(llama):
    ids, mask = prompts(5)
    cache = FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2)
    llama.set_attn_implementation("sdpa")
    with refuse("layer 0 did not ask this cache: the model's attention is not the one"):
        draw_text(llama, ids, mask, cache)
    llama.set_attn_implementation("fewlines")


def test_what_is_asked_too_much_of_it_is_refused(llama):
    def make(**more) -> FewLinesCache:
        return FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2, **more)

    ids, mask = prompts(5)
    with refuse("all 16 tokens of the image have come, and 0 after it; end generate there"):
        draw_text(llama, ids, mask, make(), SIDE * SIDE + 2)
    draw_text(llama, ids, mask, make(tail=1), SIDE * SIDE + 2)  # the last is drawn, never read
    used = make()
    draw_text(llama, ids, mask, used)
    longer = torch.cat([ids, ids, ids, ids, ids], 1)
    with refuse("make a new one for every call of generate"):
        draw_text(llama, longer, torch.ones_like(longer), used)
    with refuse("make a new one for every call of generate, and leave out prefill_chunk_size"):
        llama.generate(
            ids, attention_mask=mask, cache=make(), max_new_tokens=3, prefill_chunk_size=2
        )
    with refuse("beams, assisted decoding and contrastive search go back to tokens"):
        llama.generate(ids, attention_mask=mask, cache=make(), max_new_tokens=4, num_beams=2)
    right = torch.tensor([[1, 8, 9, 6, 0], [1, 8, 9, 9, 6]])
    with refuse("padded on the right or within; write padding_side='left'"):
        draw_text(llama, right, (right != 0).long(), make())


def test_what_does_not_fit_the_model_is_refused_at_once(llama, janus, tmp_path):
    with refuse(r"llama does not say how many tokens its images have; write grid="):
        FewLinesCache(llama, "streaming", lines=2)
    with refuse("unknown policy 'lru'"):
        FewLinesCache(janus, "lru", lines=2)
    with refuse("needs a budget"):
        FewLinesCache(janus, "streaming")
    with refuse("name a policy, such as"):
        FewLinesCache(janus)
    with refuse("needs a calibration of this model"):
        FewLinesCache(janus, "scheduled", lines=2)
    with refuse("lines beside a cache that is made; leave them out"):
        FewLinesCache(janus, fewlines.cache("full"), lines=2)
    made = Schedule.of(fewlines.cache("lines", lines=2), FewLinesCache(janus, "full").geometry)
    made.save(tmp_path / "schedule.safetensors")
    with refuse("the schedule is of lines-2lines, not of lines-3lines"):
        FewLinesCache(janus, "lines", lines=3, schedule=tmp_path / "schedule.safetensors")
    with refuse("made for another model"):
        FewLinesCache(llama, grid=(2, 8), schedule=tmp_path / "schedule.safetensors")


# Calibrated.


@pytest.fixture(scope="module")
def saved(janus, tmp_path_factory) -> Path:
    """The tiny Janus as a folder, with a tokenizer of a few words, and prompts."""
    folder = tmp_path_factory.mktemp("tiny-janus")
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<|User|>:",
        "<image_placeholder>",
        "<begin_of_image>",
    ]
    words += ["<end_of_image>", "a", "dog", "on", "the", "moon"]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"image_token": words[5], "boi_token": words[6], "eoi_token": words[7]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens=special,
    )  # fmt: skip
    processor = JanusProcessor(JanusImageProcessor(), tokenizer, use_default_system_prompt=False)
    processor.save_pretrained(folder)
    janus.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a dog\n\na dog on the moon\n")
    return folder


def calibrate(folder: Path, out: Path, capsys, *more: str) -> tuple[int, str]:
    given = [f"--transformers={folder}", f"--prompts={folder / 'prompts.txt'}", f"--output={out}"]
    return main(["calibrate", *given, "--images=4", *more]), capsys.readouterr().err


@pytest.mark.parametrize("cache", ["scheduled+merge:2lines", "scheduled+merge+allocated:2lines"])
def test_a_model_is_calibrated_and_served_by_a_small_file(saved, janus, tmp_path, capsys, cache):
    out = tmp_path / "janus.safetensors"
    assert calibrate(saved, out, capsys, f"--cache={cache}")[0] == 0
    assert out.stat().st_size < 20_000
    allocation = "calibrated" if "allocated" in cache else "uniform"
    few = FewLinesCache(
        janus, "scheduled", lines=2, merge=True, allocation=allocation, schedule=out
    )
    ids, mask = prompts(6, 3)
    drawn = draw_janus(janus, ids, mask, few)
    assert drawn.shape == (2, SIDE * SIDE)
    schedule = Schedule.load(out)
    assert (schedule.model, schedule.evictions.geometry.grid) == (saved.name, (SIDE, SIDE))
    assert few.bytes < FewLinesCache(janus, "full").count_bytes(6, 4, torch.float32)
    again = tmp_path / "again.safetensors"
    assert calibrate(saved, again, capsys, f"--cache={cache}")[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_calibration_is_the_models_own_attention(saved, janus, tmp_path):
    """Against `eager`, which returns its weights."""
    from fewlines.calibration.capture import capture_expected
    from fewlines.integrations.layered import LayeredDecoder, draw_codes, list_branches

    prompt = prompts(5)[0]
    geometry = FewLinesCache(janus, "full").geometry
    codes = draw_codes(janus, prompt, 2, geometry, 0)
    branches = list_branches(janus, prompt)
    assert branches.tolist()[1] == [1, 0, 0, 0, 6]
    of = LayeredDecoder(janus, branches)
    found = capture_expected(of, torch.zeros(2, dtype=torch.long), codes, 1)
    embedded = of.embed(torch.zeros(2, dtype=torch.long), codes)
    janus.set_attn_implementation({"text_config": "eager"})
    seen = janus.model.language_model(inputs_embeds=embedded, output_attentions=True).attentions
    janus.set_attn_implementation({"text_config": "fewlines"})
    for layer, weights in enumerate(seen):
        image = weights[:, :, 5:, 5:].unflatten(1, (2, 2)).mean((0, 2))
        np.testing.assert_allclose(found.attention[layer][:, :-1, :-1], image, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cache=streaming:2lines"], "goes by no calibration; FewLinesCache takes it as it is"),
        (["--transformers=nowhere"], "nowhere holds no model of transformers"),
        (["--grid=4"], "is not lines and tokens of a line, such as 24x24"),
        (["--model=x"], "goes with --prompts, --images, --cache and --grid alone"),
    ],
)
def test_what_cannot_be_calibrated_is_said(saved, tmp_path, capsys, more, message):
    code, said = calibrate(saved, tmp_path / "out", capsys, *more)
    assert code == 2
    assert re.search(re.escape(message), said)
    assert not (tmp_path / "out").exists()
