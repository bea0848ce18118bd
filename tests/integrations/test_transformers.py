"""Models of transformers under a cache of a few lines: tiny and random, but of the true build."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import re
import shlex
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BatchFeature,
    DynamicCache,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import fewlines
from conftest import CACHES, DECODED, GRID, calibrated, tiny_transformer
from fewlines.attention.teacher_forced import TeacherForced
from fewlines.cache.schedule import Schedule
from fewlines.calibration.capture import capture_expected
from fewlines.cli import main
from fewlines.decode.loop import generate
from fewlines.decode.sampler import Sampler
from fewlines.errors import FewlinesError
from fewlines.integrations.huggingface import generate_codes, make_llama
from fewlines.integrations.layered import (
    LayeredDecoder,
    draw_codes,
    list_branches,
    read_prompts,
)
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


def randomise(model, seed: int = 0):
    """Larger than at the start of training: attention must matter."""
    generator = torch.Generator().manual_seed(seed)
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


ALLOCATED = [
    calibrated(
        fewlines.cache(policy, lines=2, merge=merge, allocation=allocation),
        tiny_transformer().shape.geometry,
    )
    for (policy, merge), allocation in zip(
        itertools.product(DECODED, (False, True)),
        itertools.cycle(("pyramid", "headkv", "ada")),
        strict=False,
    )
]  # each policy, dropped under one of them and merged under another


@pytest.mark.parametrize("cache", [*CACHES, *ALLOCATED], ids=lambda cache: cache.slug)
def test_tokens_are_those_of_our_own_engine(model, cache):
    """Every policy, merged or dropped, uniform or allocated: queries in groups of two."""
    ours = generate(model, LABELS, cache, sampler=Sampler(temperature=0))
    llama = make_llama(model)
    prefix = model.embed_labels(torch.tensor(LABELS))
    theirs = FewLinesCache(llama, cache, grid=GRID)
    assert torch.equal(generate_codes(llama, prefix, N, theirs), ours)
    assert theirs.bytes == model.count_bytes(cache, len(LABELS), torch.float32)
    assert theirs.bytes == theirs.count_bytes(1, len(LABELS), torch.float32)


@pytest.mark.parametrize("cache", [*CACHES[1::5], *ALLOCATED[::5]], ids=lambda cache: cache.slug)
def test_queries_of_their_own(cache):
    model = tiny_transformer(kv_heads=4)
    cache = calibrated(replace(cache, calibration=None), model.shape.geometry)
    ours = generate(model, LABELS, cache, sampler=Sampler(temperature=0))
    llama, prefix = make_llama(model), model.embed_labels(torch.tensor(LABELS))
    assert torch.equal(
        generate_codes(llama, prefix, N, FewLinesCache(llama, cache, grid=GRID)), ours
    )


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache", [*CACHES[1::9], *ALLOCATED[::9]], ids=lambda cache: cache.slug)
def test_what_is_kept_in_16_bits_is_what_our_engine_keeps(model, cache, storage):
    """To the last token, evicted, scored and merged."""
    ours = generate(model, LABELS, cache, sampler=Sampler(temperature=0), storage=storage)
    llama, prefix = make_llama(model), model.embed_labels(torch.tensor(LABELS))
    theirs = FewLinesCache(llama, cache, grid=GRID, storage=storage)
    assert torch.equal(generate_codes(llama, prefix, N, theirs), ours)
    assert theirs.bytes == model.count_bytes(cache, len(LABELS), storage)


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


LINE = SIDE + 1  # tokens of a line of the tiny Emu3, with the one that ends it


def draw_emu3(model, ids, mask, caches, scale: float = 2.0) -> torch.Tensor:
    """An end-of-line token in each line, three tokens after the image, guidance by a branch of its
    own, whose prompt is shorter."""
    without, prompt = torch.tensor([[1, 9]]).repeat(len(ids), 1), ids.shape[1]

    def allowed(_: int, so_far: torch.Tensor) -> list[int]:
        place = len(so_far) - prompt
        if place >= SIDE * LINE:
            return [[32], [2], [0]][place - SIDE * LINE]
        return [30] if place % LINE == SIDE else list(range(10, 30))

    guidance = make_guidance(model, scale, without, torch.ones_like(without), caches[1])
    how = {"max_new_tokens": SIDE * LINE + 3, "do_sample": False, "eos_token_id": None}
    how |= {
        "prefix_allowed_tokens_fn": allowed,
        "logits_processor": LogitsProcessorList([guidance]),
    }
    return model.generate(ids, attention_mask=mask, cache=caches[0], **how)[:, prompt:]


def bound_emu3(model, policy, **options) -> list[FewLinesCache]:
    return [FewLinesCache(model, policy, grid=(SIDE, LINE), **options) for _ in range(2)]


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o"])
def test_emu3_with_both_branches_bounded(emu3, policy):
    ids, mask = prompts(5, 5)
    stock = [DynamicCache(config=emu3.config.text_config) for _ in range(2)]
    theirs = draw_emu3(emu3, ids, mask, stock)
    budget = {} if policy == "full" else {"lines": SIDE}
    whole = bound_emu3(emu3, policy, **budget)
    assert torch.equal(draw_emu3(emu3, ids, mask, whole), theirs)
    if policy == "full":
        return
    few = bound_emu3(emu3, policy, lines=2, merge=True)
    drawn = draw_emu3(emu3, ids, mask, few)
    assert not torch.equal(drawn, theirs)
    assert (drawn[:, SIDE::LINE][:, :SIDE] == 30).all()
    assert few[0].bytes < whole[0].bytes / 1.4
    assert few[1].bytes == few[1].count_bytes(2, 2, torch.float32)


# Equal to another way of computing: all tokens at once, evictions as a mask.


SCHEDULED = [
    fewlines.cache(policy, lines=2, merge=merge, allocation=allocation)
    for policy, merge, allocation in (
        ("streaming", False, "uniform"),
        ("streaming", True, "pyramid"),
        ("scheduled", True, "calibrated"),
        ("diagonal", False, "uniform"),
    )
]


def see(model, prompt, codes, cache, grid) -> torch.Tensor:
    """Logits `(B, N, V)` of a prompt `(1, T)` and codes, limited as the cache limits them."""
    of = LayeredDecoder(model, prompt, grid)
    limits = TeacherForced(calibrated(cache, of.geometry).plan(of.geometry))
    labels = torch.zeros(len(codes), dtype=torch.long)
    return of.read_out(of.run_layers(of.embed(labels, codes), limits))


@pytest.mark.parametrize("cache", SCHEDULED, ids=lambda cache: cache.slug)
def test_bounded_janus_and_emu3_draw_what_all_tokens_at_once_say(janus, emu3, cache):
    ids, mask = prompts(5)
    of = FewLinesCache(janus, "full").geometry
    codes = draw_janus(janus, ids, mask, FewLinesCache(janus, calibrated(cache, of)))
    given, blank = (
        see(janus, branch[None], codes, cache, None) for branch in list_branches(janus, ids)
    )
    assert torch.equal((blank + 3.0 * (given - blank)).argmax(-1), codes)
    of = replace(of, grid=(SIDE, LINE))
    few = bound_emu3(emu3, calibrated(cache, of))
    codes = draw_emu3(emu3, ids, mask, few)[:, : SIDE * LINE]
    given, blank = (
        see(emu3, prompt, codes, cache, (SIDE, LINE)).log_softmax(-1)
        for prompt in (ids, torch.tensor([[1, 9]]))
    )
    guided = (blank + 2.0 * (given - blank))[..., 10:30].argmax(-1) + 10
    inside = codes != 30
    assert inside.sum() == SIDE * SIDE
    assert torch.equal(guided[inside], codes[inside])


# Prompts.


@pytest.mark.parametrize(
    "cache",
    [
        fewlines.cache("streaming", lines=2),
        fewlines.cache("streaming", lines=2, merge=True),
        fewlines.cache("h2o", lines=2, merge=True),
        fewlines.cache("snapkv", lines=2),
        fewlines.cache("line_ar", lines=2, anchor=1, pool="query"),
        fewlines.cache("h2o", lines=2, merge=True, allocation="pyramid"),
        fewlines.cache("scheduled", lines=2, merge=True, allocation="calibrated"),
        fewlines.cache("full"),
    ],
    ids=lambda cache: cache.slug,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_of_mixed_length_are_drawn_as_each_alone(llama, janus, emu3, cache, dtype):
    """Padding is on the left and nobody looks at it, in the compiled kernel and by torch."""
    llama, janus, emu3 = (recast(type(each), each, dtype) for each in (llama, janus, emu3))
    ids, mask = prompts(3, 7, 5)
    of = FewLinesCache(janus, "full").geometry
    lined, cache = calibrated(cache, replace(of, grid=(SIDE, LINE))), calibrated(cache, of)
    together = draw_emu3(emu3, ids, mask, bound_emu3(emu3, lined))
    for row, length in enumerate((3, 7, 5)):
        one = ids[row : row + 1, -length:]
        alone = draw_emu3(emu3, one, torch.ones_like(one), bound_emu3(emu3, lined))
        assert torch.equal(alone[0], together[row])
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


def test_the_vision_tower_keeps_its_attention(janus):
    before = janus.config.vision_config._attn_implementation
    FewLinesCache(janus, "streaming", lines=2)
    assert janus.config.text_config._attn_implementation == "fewlines"
    assert janus.config.vision_config._attn_implementation == before != "fewlines"


def test_a_scale_of_the_models_own_is_kept(llama):
    """As Granite and others have one: with a cache, and with attention that calibration brings."""
    ids, mask = prompts(5, 3)
    twin = recast(LlamaForCausalLM, llama, torch.float64)
    for layer in twin.model.layers:
        layer.self_attn.scaling = 0.1
    theirs = draw_text(twin, ids, mask, DynamicCache(config=twin.config))
    assert not torch.equal(theirs, draw_text(llama, ids, mask, DynamicCache(config=llama.config)))
    ours = FewLinesCache(twin, "streaming", grid=(SIDE, SIDE), lines=SIDE)
    assert torch.equal(draw_text(twin, ids, mask, ours), theirs)
    ids = ids[:1]
    of = LayeredDecoder(twin, ids, (SIDE, SIDE))
    found = of.read_out(of.run_layers(of.embed(torch.zeros(1, dtype=torch.long), theirs[:1])))
    assert torch.equal(found.argmax(-1), theirs[:1])


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


KNOWN = "fewlines knows it from 5.24 to before 6.0, whose models take an argument 'cache'"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("5.23.4", f"transformers 5.23.4 is installed, and {KNOWN}"),
        ("6.0.0", f"transformers 6.0.0 is installed, and {KNOWN}"),
        ("6", f"transformers 6 is installed, and {KNOWN}"),
        ("5.23rc1", f"transformers 5.23rc1 is installed, and {KNOWN}"),
        (None, "transformers is not installed: pip install 'fewlines[transformers]'"),
    ],
)
def test_other_versions_are_refused_as_it_is_imported(monkeypatch, capsys, found, message):
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in [name for name in sys.modules if name.startswith("fewlines.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "layered", "huggingface"):
        with refuse(re.escape(message)):
            importlib.import_module(f"fewlines.integrations.{name}")
    given = ["--transformers=nowhere", "--prompts=x", "--output=y", "--cache=scheduled:2lines"]
    assert main(["calibrate", *given]) == 2
    assert message in capsys.readouterr().err


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
    with refuse("make a new one for every call of generate, and leave out prefill_chunk_size"):
        llama.generate(
            ids, attention_mask=mask, cache=make(), max_new_tokens=3, prefill_chunk_size=2
        )
    with refuse("beams, assisted decoding and contrastive search go back to tokens"):
        llama.generate(ids, attention_mask=mask, cache=make(), max_new_tokens=4, num_beams=2)
    right = torch.tensor([[1, 8, 9, 6, 0], [1, 8, 9, 9, 6]])
    with refuse("padded on the right or within; write padding_side='left'"):
        draw_text(llama, right, (right != 0).long(), make())


@pytest.mark.parametrize("read", range(1, SIDE * SIDE))
def test_a_second_call_goes_on_with_the_next_token_or_draws_nothing(llama, janus, read):
    """After a whole image and after a part of one, as an interrupted call leaves it: the same
    prompt again, a longer one, and the tokens so far with one that was not read, whose padding is
    said or forgotten."""
    ids, mask = prompts(5, 4)
    whole = FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2)
    tokens = draw_text(llama, ids, mask, whole, SIDE * SIDE + 1)
    used = FewLinesCache(llama, "streaming", grid=(SIDE, SIDE), lines=2)
    drawn = draw_text(llama, ids, mask, used, read + 1)
    assert used.get_seq_length() == 5 + read
    again = torch.cat([ids, drawn], 1)
    for padded in (ids, torch.ones_like(again)):
        with refuse("make a new one for every call of generate"):
            given, seen = (ids, mask) if padded is ids else (again, padded)
            draw_text(llama, given, seen, used, read + 1)
    longer = torch.cat([ids, ids, ids, ids, ids, ids], 1)
    with refuse("make a new one for every call of generate"):
        draw_text(llama, longer, torch.ones_like(longer), used, read + 1)
    kept = torch.cat([mask, torch.ones_like(drawn)], 1)  # what was refused has changed nothing
    assert torch.equal(draw_text(llama, again, kept, used, 1)[:, 0], tokens[:, read + 1])
    used = FewLinesCache(janus, "streaming", lines=2)
    draw_janus(janus, ids, mask, used)
    with refuse("make a new one for every call of generate"):
        draw_janus(janus, ids, mask, used)


def test_what_other_models_have_is_refused(llama, janus):
    sliding = {**TEXT, "sliding_window": 8}
    mistral = randomise(MistralForCausalLM(MistralConfig(**sliding)))
    ids, mask = prompts(9)
    with refuse("this model's attention has sliding_window, which no engine here has"):
        draw_text(mistral, ids, mask, FewLinesCache(mistral, "streaming", grid=(4, 4), lines=2))
    many = deepcopy(llama)
    many.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with refuse("this model is spread over 0, 1; load it on one device"):
        FewLinesCache(many, "streaming", grid=(4, 4), lines=2)
    del many.hf_device_map
    many.config.head_dim = 16  # of a configuration that its weights do not follow
    with refuse("keys of 2 heads of 8, where the model's configuration says 2 of 16"):
        draw_text(many, ids, mask, FewLinesCache(many, "streaming", grid=(4, 4), lines=2))
    cache = FewLinesCache(llama, "streaming", grid=(4, 4), lines=2)
    assert not cache.is_compileable  # so `generate` compiles nothing by itself
    with pytest.raises(ValueError, match="cache that can be cropped"):
        llama.generate(ids, attention_mask=mask, cache=cache, assistant_model=llama)


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


WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "<|User|>:", "<image_placeholder>", "<begin_of_image>",
    "<end_of_image>", "a", "dog", "on", "the", "moon", "4*4", "<image>", "<eof>",
]  # fmt: skip


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens=special,
    )  # fmt: skip


def save(model, reader, folder: Path) -> Path:
    """A tiny model as a folder, with a tokenizer of a few words, and prompts."""
    reader.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a dog\n\na dog on the moon\n")
    return folder


SAID = "{% for each in messages %}<|User|>: {{ each['content'][0]['text'] }} {% endfor %}"


@pytest.fixture(scope="module")
def saved(janus, tmp_path_factory) -> Path:
    names = {"image_token": WORDS[5], "boi_token": WORDS[6], "eoi_token": WORDS[7]}
    processor = JanusProcessor(
        JanusImageProcessor(), make_tokenizer(**names), SAID, use_default_system_prompt=False
    )
    return save(janus, processor, tmp_path_factory.mktemp("tiny-janus"))


@pytest.fixture(scope="module")
def saved_emu3(emu3, tmp_path_factory) -> Path:
    names = {
        "image_token": "<image>", "boi_token": WORDS[6], "eoi_token": WORDS[7],
        "image_wrapper_token": WORDS[5], "eof_token": "<eof>",
    }  # fmt: skip
    processor = Emu3Processor(Emu3ImageProcessor(), make_tokenizer(**names))
    return save(emu3, processor, tmp_path_factory.mktemp("tiny-emu3"))


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
    (first, _) = read_prompts(saved / "prompts.txt", saved, janus, few.geometry)
    assert [WORDS[each] for each in first[0, -4:]] == ["<|User|>:", "a", "dog", "<begin_of_image>"]
    schedule = Schedule.load(out)
    assert (schedule.model, schedule.evictions.geometry.grid) == (saved.name, (SIDE, SIDE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FewLinesCache(janus, schedule=out)
    other = randomise(recast(type(janus), janus, torch.float64), seed=1)
    with pytest.warns(UserWarning, match="other weights"):
        FewLinesCache(other, schedule=out)
    assert few.bytes < FewLinesCache(janus, "full").count_bytes(6, 4, torch.float32)
    again = tmp_path / "again.safetensors"
    assert calibrate(saved, again, capsys, f"--cache={cache}")[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_other_models_are_calibrated(saved_emu3, emu3, llama, tmp_path, capsys):
    """Emu3, which says the size of an image in its prompt and is held to its codes and ends of
    lines; and any decoder that is built as Llama's."""
    out = tmp_path / "emu3.safetensors"
    given = ["--cache=scheduled+merge:2lines", f"--grid={SIDE}x{LINE}"]
    assert calibrate(saved_emu3, out, capsys, *given)[0] == 0
    geometry = Schedule.load(out).evictions.geometry
    assert geometry.grid == (SIDE, LINE)
    (first, _) = read_prompts(saved_emu3 / "prompts.txt", saved_emu3, emu3, geometry)
    said = [WORDS[each] for each in first[0]]
    assert said[-4:] == ["dog", "<begin_of_image>", "4*4", "<image_placeholder>"]
    codes = draw_codes(emu3, first, 3, geometry, 0).unflatten(1, (SIDE, LINE))
    assert (codes[..., -1] == 30).all()
    assert ((codes[..., :-1] >= 10) & (codes[..., :-1] < 30)).all()
    ids, mask = prompts(5, 3)
    few = bound_emu3(emu3, None, schedule=out)
    assert draw_emu3(emu3, ids, mask, few).shape == (2, SIDE * LINE + 3)
    folder = save(llama, make_tokenizer(), tmp_path / "tiny-llama")
    out = tmp_path / "llama.safetensors"
    assert calibrate(folder, out, capsys, given[0], "--grid=4x4")[0] == 0
    few = FewLinesCache(llama, schedule=out, grid=(4, 4))
    assert draw_text(llama, ids, mask, few).shape == (2, 16)


def test_the_pages_lines_draw_and_calibrate(saved, emu3, tmp_path, monkeypatch):
    """docs/public-models.md, of which only sizes are replaced."""
    page = (REPOSITORY / "docs/public-models.md").read_text().split("## Models of transformers")[1]
    blocks = [
        block.replace("lines=4", "lines=2")
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ]
    whole, guided, scheduled = blocks
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Janus-Pro-1B").symlink_to(saved)
    (tmp_path / "prompts.txt").write_text("a dog\n")
    names: dict[str, object] = {}
    exec(whole, names)
    assert Image.open("dog.png").size == (8, 8)
    (command,) = re.findall(r"^fewlines (calibrate .*)$", page, re.MULTILINE)
    assert main(shlex.split(command.replace("4lines", "2lines").replace("16", "2"))) == 0
    exec(scheduled, names)
    assert draw_janus(names["model"], *prompts(5), names["cache"]).shape == (1, SIDE * SIDE)
    ids, mask = prompts(5)
    how = {"max_new_tokens": SIDE * LINE, "do_sample": False, "eos_token_id": None}
    names = {
        "FewLinesCache": FewLinesCache, "model": emu3, "grid": (SIDE, LINE), "processors": [],
        "cache": bound_emu3(emu3, "streaming", lines=2)[0],
        "negative": BatchFeature({"input_ids": ids[:, 2:], "attention_mask": mask[:, 2:]}),
        "inputs": {"inputs": ids, "attention_mask": mask, **how},
    }  # fmt: skip
    exec(guided, names)
    assert names["without"].get_seq_length() == 3 + SIDE * LINE - 1


def test_the_calibration_is_the_models_own_attention(saved, janus, tmp_path):
    """Against `eager`, which returns its weights."""
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
        (["--prompts=/dev/null"], "/dev/null has no prompts; write one a line"),
        (["--model=x"], "goes with --prompts, --images, --cache and --grid alone"),
    ],
)
def test_what_cannot_be_calibrated_is_said(saved, tmp_path, capsys, more, message):
    code, said = calibrate(saved, tmp_path / "out", capsys, *more)
    assert code == 2
    assert re.search(re.escape(message), said)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_is_named(llama, tmp_path, capsys):
    folder = tmp_path / "bare"
    llama.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a dog\n")
    code, said = calibrate(
        folder, tmp_path / "out", capsys, "--cache=scheduled:2lines", "--grid=4x4"
    )
    assert (code, "bare has no tokenizer that can be read" in said) == (2, True)


def test_a_decoder_that_is_built_otherwise_is_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2))
    with refuse("gpt2 has no layers in its decoder; calibration knows decoders that are built as"):
        LayeredDecoder(model, prompts(3)[0], (4, 4))
