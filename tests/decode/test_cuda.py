"""A GPU decodes, measures and trains as the processor does. Skipped where there is none; the device
runs of docs/engine.md ran it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewlines
from conftest import CACHES, GRID, calibrated, images, step_by_step, tiny_transformer
from fewlines.attention.buffer import BoundedCache
from fewlines.bench import memory, roofline
from fewlines.decode.loop import Decoder, decode
from fewlines.decode.sampler import Sampler, draw_noise
from fewlines.integrations.transformers import FewLinesCache
from fewlines.metrics.likelihood import compare_storages, measure_likelihood
from fewlines.models.llamagen.engine import prepare
from fewlines.models.llamagen.settings import LlamaGenSettings
from fewlines.training.loop import take_step
from fewlines.training.model import ModelObjective

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
triton_kernels = pytest.importorskip("fewlines.attention.triton_kernels")

N = GRID[0] * GRID[1]
LABELS = torch.tensor([0, 1, 2, 3, 0])
FULL = fewlines.cache("full")


@pytest.fixture(scope="module")
def gpu64(model64):
    return copy.deepcopy(model64).cuda()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cache", [FULL, *CACHES], ids=lambda cache: cache.slug)
def test_a_gpu_draws_the_tokens_of_the_processor(model64, gpu64, cache, guidance):
    """In float64, by replayed CUDA graphs there and by torch's operators here."""
    noise, sampler = draw_noise(3, range(len(LABELS)), N), Sampler(guidance=guidance)
    expected = decode(model64, LABELS, noise, cache, sampler)
    drawn = decode(gpu64, LABELS.cuda(), noise.cuda(), cache, sampler)
    assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize(
    "cache", [FULL, *CACHES[:: len(CACHES) // 12]], ids=lambda cache: cache.slug
)
def test_programs_that_share_a_head_draw_the_same(model64, gpu64, cache, monkeypatch):
    monkeypatch.setattr(triton_kernels, "segments", lambda *_: 4)
    monkeypatch.setattr(triton_kernels, "block", lambda *_: 4)
    noise = draw_noise(3, range(len(LABELS)), N)
    expected = decode(model64, LABELS, noise, cache)
    assert torch.equal(decode(gpu64, LABELS.cuda(), noise.cuda(), cache).cpu(), expected)


def test_a_stock_cache_draws_the_same_as_a_graph(model64, gpu64):
    noise = draw_noise(3, range(len(LABELS)), N)
    expected = decode(model64, LABELS, noise, FULL)
    for engine in ("stock", "stock-graph"):
        drawn = decode(gpu64, LABELS.cuda(), noise.cuda(), FULL, engine=engine)
        assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize(
    ("cache", "engine"), [(fewlines.cache("streaming", lines=1), "lean"), (FULL, "stock-graph")]
)
def test_steps_are_replayed(gpu64, cache, engine):
    decoder = Decoder(gpu64, 2, cache, engine=engine)
    noise = draw_noise(0, range(2), N).cuda()
    with torch.inference_mode():
        codes = decoder.start(LABELS[:2].cuda(), noise[:, 0])
        for step in range(N - 1):
            codes = decoder.step(step, codes, noise[:, step + 1])
    assert decoder.graphs is not None
    assert 1 <= len(decoder.graphs.graphs) <= 4


@pytest.mark.parametrize("cache", CACHES[:: len(CACHES) // 24], ids=lambda cache: cache.slug)
def test_likelihood_is_that_of_the_processor(model64, gpu64, cache):
    here, there = (
        measure_likelihood(model, *images(model64, 5), cache, batch=3) for model in (model64, gpu64)
    )
    torch.testing.assert_close(there.nll, here.nll, atol=2e-5, rtol=0)
    torch.testing.assert_close(there.kl, here.kl, atol=2e-5, rtol=0)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_a_model_of_transformers_draws_the_tokens_of_the_processor(policy, merge):
    """Prompts of different length, in float64."""
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).double().eval()
    ids = torch.tensor([[0, 0, 7, 8], [9, 8, 7, 6]])
    drawn = []
    for device in ("cpu", "cuda"):
        cache = FewLinesCache(llama.to(device), policy, grid=(4, 4), lines=2, merge=merge)
        given = ids.to(device)
        how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
        drawn.append(llama.generate(given, attention_mask=(given > 0).long(), cache=cache, **how))
    assert torch.equal(drawn[0], drawn[1].cpu())


def test_what_16_bits_change_is_little(model):
    network = copy.deepcopy(model).cuda()
    (found,) = compare_storages(network, *images(model, 4), [torch.float16])
    assert found.equal_tokens > 0.9
    assert found.nll_delta.abs().max() < 0.01


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "cache", [FULL, fewlines.cache("random", lines=2, merge=True)], ids=lambda cache: cache.slug
)
def test_logits_of_16_bit_decoding_are_near_those_of_float32(model, cache, storage):
    labels, codes = images(model, 4)
    plan = calibrated(cache, model.shape.geometry).plan(model.shape.geometry)
    logits = []
    for dtype, device in ((torch.float32, "cpu"), (storage, "cuda")):
        ready = prepare(copy.deepcopy(model).to(device), dtype, len(labels))
        buffers = BoundedCache(plan, len(labels), model.shape.head_dim, dtype, device)
        given = (labels.to(device), codes.to(device))
        logits.append(step_by_step(ready, *given, buffers).float().cpu())
    scale = logits[0].std()
    assert (logits[1] - logits[0]).abs().mean() < 0.02 * scale


def test_the_peak_is_that_of_the_buffers(gpu64):
    """A full cache of many rows: keys and values are nearly all that a decode allocates."""
    rows = 4096
    noise = draw_noise(0, range(rows), N).cuda()
    labels, held = torch.zeros(rows, dtype=torch.long, device="cuda"), []
    memory.reset_peak()
    before = memory.resident_bytes()
    decode(gpu64, labels, noise, FULL, watch=lambda step, buffers: held.append(buffers.bytes))
    peak = memory.peak_bytes() - before
    assert held[-1] < peak < 3 * held[-1]


@pytest.mark.parametrize("policy", ["streaming", "line_ar"])
def test_a_step_of_training_is_that_of_the_processor(policy):
    losses = []
    for device in ("cpu", "cuda"):
        network = tiny_transformer().to(device).requires_grad_(True).train()
        memory_of = network.limit(fewlines.cache(policy, lines=2))
        settings = LlamaGenSettings(batch=4, steps=4)
        task = ModelObjective(settings, network, *images(network, 8), 0, memories=[memory_of])
        losses.append([take_step(task, step).item() for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][-1] != losses[1][0]


def test_what_a_gpu_can_do_is_probed(model):
    cost = model.Cost(model.shape, 4, FULL, torch.bfloat16, torch.bfloat16)
    probe = roofline.probe_machine(cost)
    assert probe["bandwidth"] > 1e11
    assert probe["operator_seconds"] < 1e-4
    assert min(min(rates.values()) for rates in probe["linear_rates"].values()) > 0


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16])
@pytest.mark.parametrize("cache", [FULL, fewlines.cache("lines", lines=2, merge=True)])
def test_a_model_in_16_bits_draws_as_it_is(model, cast, cache):
    """`model.half().cuda()`, labels as a list: as users write it."""
    small = cast(copy.deepcopy(model)).cuda()
    drawn = fewlines.generate(small, [0, 1, 2], cache, seed=1)
    assert drawn.shape == (3, N)
    assert 0 <= drawn.min() <= drawn.max() < 16
    again = fewlines.generate(small, torch.tensor([0, 1, 2]), cache, seed=1, batch=3)
    assert torch.equal(drawn, again)
    logits = small.teacher_forced(torch.tensor([0, 1, 2]).cuda(), drawn).float().cpu()
    expected = model.teacher_forced(torch.tensor([0, 1, 2]), drawn.cpu())
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    greedy = fewlines.Sampler(temperature=0)
    one, other = (fewlines.generate(small, 0, cache, seed, sampler=greedy) for seed in (0, 1))
    assert torch.equal(one, other)


def test_weights_that_are_not_finite_draw_nothing_on_a_gpu(model):
    broken = copy.deepcopy(model).cuda()
    broken.layers[1].attention.wo.weight[0, 0] = torch.nan
    for sampler in (None, fewlines.Sampler(temperature=0)):
        for cache in (FULL, fewlines.cache("lines", lines=1)):
            with pytest.raises(fewlines.FewlinesError, match="logits are not finite"):
                fewlines.generate(broken, [0, 1], cache, sampler=sampler)
