from __future__ import annotations

import pytest
import torch

from conftest import GRID, tiny_transformer
from fewlines.models.llamagen.engine import prepare
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape

N = GRID[0] * GRID[1]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 0.5)]
)
def test_a_prepared_model_is_the_same_model(dtype, tolerance, kv_heads, rows):
    model = tiny_transformer(torch.float64 if dtype == torch.float64 else torch.float32, kv_heads)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (rows, N), generator=generator)
    labels = torch.arange(rows)
    expected = model.teacher_forced(labels, codes)
    ready = prepare(model, dtype, rows)
    with torch.inference_mode():
        actual = ready.teacher_forced(labels, codes)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(model.teacher_forced(labels, codes), expected)  # left as it was
    consumed = prepare(model, dtype, rows, consume=True)
    with torch.inference_mode():
        torch.testing.assert_close(consumed.teacher_forced(labels, codes), actual)
    assert model.output.weight.numel() == 0


def test_bfloat16_answers_in_float32_and_close_by():
    shape = TransformerShape(64, 2, 4, 4, 32, 3, GRID)
    model = Transformer(shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for table in (model.tok_embeddings, model.cls_embedding.embedding_table):
        torch.nn.init.normal_(table.weight, generator=generator)
    labels, codes = torch.zeros(4, dtype=torch.long), torch.zeros(4, N, dtype=torch.long)
    ready = prepare(model, torch.bfloat16, 4)
    with torch.inference_mode():
        logits = ready.teacher_forced(labels, codes)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.teacher_forced(labels, codes), atol=0.03, rtol=0.03)
