"""The GPU's kernel without a GPU: interpreted, and compiled for one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

import fewlines
from conftest import calibrated, images, step_by_step, tiny_transformer
from fewlines.attention.buffer import BoundedCache, compiled_step, torch_step, triton_step

triton_kernels = pytest.importorskip("fewlines.attention.triton_kernels")
pytestmark = pytest.mark.no_cover  # a tracer doubles the time of what is interpreted
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda runs it on the GPU")

WATCHED = {"lines": 2, "merge": True}
CASES = [
    (fewlines.cache("full"), 4, 1),
    (fewlines.cache("full"), 2, 2),
    (fewlines.cache("streaming", lines=1, merge=True), 2, 1),
    (fewlines.cache("line_ar", **WATCHED, pool="max"), 2, 1),
    (fewlines.cache("line_ar", **WATCHED, pool="max"), 2, 2),
    (fewlines.cache("h2o", **WATCHED), 2, 1),
    (fewlines.cache("snapkv", lines=2, allocation="ada"), 2, 1),
    (fewlines.cache("scheduled", lines=2, merge=True, allocation="bands"), 2, 2),
]


@interpreted
@pytest.mark.parametrize(
    ("cache", "kv_heads", "segments"), CASES, ids=lambda each: getattr(each, "slug", each)
)
def test_the_kernel_of_a_gpu_agrees_with_torchs_operators(cache, kv_heads, segments, monkeypatch):
    """Interpreted, where there is no GPU: the same logits, and the same entries afterwards, also
    where programs share the entries of a head."""
    monkeypatch.setattr(triton_kernels, "segments", lambda *_: segments)
    monkeypatch.setattr(triton_kernels, "block", lambda *_: 16 // segments)
    model = tiny_transformer(torch.float64, kv_heads, layers=1)
    labels, codes = images(model, batch=1)
    plan = calibrated(cache, model.shape.geometry).plan(model.shape.geometry)
    logits, entries = [], []
    for make in (torch_step, triton_step):
        buffers = BoundedCache(plan, 1, model.shape.head_dim, torch.float64)
        groups = list(itertools.chain.from_iterable(buffers.layers))
        buffers.steps = [[make(group) for group in layer] for layer in buffers.layers]
        logits.append(step_by_step(model, labels, codes, buffers))
        entries.append([torch.stack([group.k, group.v]) for group in groups])
    torch.testing.assert_close(*logits, atol=1e-9, rtol=0)
    torch.testing.assert_close(*entries, atol=1e-9, rtol=0)


@interpreted
@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_the_kernel_of_a_gpu_stores_in_16_bits_what_the_compiled_one_does(storage):
    """bfloat16 is for `test_cuda`: triton's interpreter truncates where a GPU rounds."""
    model = tiny_transformer(layers=1)
    labels, codes = images(model, batch=1)
    plan = fewlines.cache("h2o", lines=2, merge=True).plan(model.shape.geometry)
    logits = []
    for make in (compiled_step, triton_step):
        buffers = BoundedCache(plan, 1, model.shape.head_dim, storage)
        buffers.steps = [[make(group) for group in layer] for layer in buffers.layers]
        logits.append(step_by_step(model, labels, codes, buffers))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-4)


COMPILES = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewlines.attention.triton_kernels import _observe_segment, _read_segment, _step, block
from fewlines.decode.triton_sampler import _draw
from fewlines.models.llamagen.triton_kernels import _rotate, _swiglu

FLOATS = {"q": 0, "k": 0, "v": 0, "out": 0, "keys": 1, "values": 1, "mean_k": 2, "mean_v": 2}
INTEGERS = ("heads", "slot", "now", "begins")

def kinds(kernel, model, stored, mean, constants):
    of = {name: f"*{(model, stored, mean)[which]}" for name, which in FLOATS.items()}
    of |= dict.fromkeys(INTEGERS, "*i64") | {"seen": "*fp32"}
    of |= dict.fromkeys(("sums", "ends"), "*fp64" if stored == "fp64" else "*fp32")
    of |= dict.fromkeys(constants, "constexpr")
    return {name: of.get(name, "i32") for name in kernel.arg_names}

for model, stored, mean, D, R in (
    ("bf16", "bf16", "fp32", 64, 1),
    ("fp32", "fp16", "fp32", 48, 4),
    ("fp64", "fp64", "fp64", 8, 2),
    ("bf16", "bf16", "fp32", 100, 1),
):
    for given, segments, merge_slots in ((False, 1, 0), (True, 1, 1), (True, 4, 3)):
        constants = {
            "D": D, "SCALE": D**-0.5, "D2": triton.next_power_of_2(D), "R2": R,
            "BLOCK": block(R, 999 * R), "ACC": tl.float64 if stored == "fp64" else tl.float32,
            "EXACT": mean != stored,
            "S": merge_slots, "OBSERVE": given, "PEAK": given, "SEGMENTS": segments,
        }
        for kernel in (_step, _read_segment, _observe_segment)[: segments]:
            used = {name: value for name, value in constants.items() if name in kernel.arg_names}
            source = ASTSource(kernel, kinds(kernel, model, stored, mean, used), used)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            print(stored, len(made.asm["cubin"]))

i32, here = "i32", GPUTarget("cuda", 90, 32)
for kernel, of, used in (
    (_rotate, {"qkv": "*bf16", "rotation": "*fp32", "T": i32, "heads": i32, "row_stride": i32},
     {"D": 48, "D2": 64, "HEADS": 8}),
    (_swiglu, {"both": "*bf16", "out": "*bf16", "hidden": i32}, {"ACC": tl.float32, "SIZE": 512}),
    *((_draw, {"logits": logits, "noise": "*fp64", "codes": "*i64", "V": i32,
               "temperature": "fp32"}, {"SIZE": 2048}) for logits in ("*fp32", "*bf16")),
):
    made = triton.compile(ASTSource(kernel, of | dict.fromkeys(used, "constexpr"), used), here)
    print(kernel.__name__, len(made.asm["cubin"]))
"""


def test_the_kernel_compiles_for_a_gpu_that_is_not_here():
    """Triton brings its own assembler; what an interpreter lets pass, a compiler may not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 24
