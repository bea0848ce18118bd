from __future__ import annotations

import pytest
import torch

import fewlines
from conftest import tiny_transformer
from fewlines.attention.teacher_forced import TeacherForced
from fewlines.errors import FewlinesError
from fewlines.files import write_tensors
from fewlines.metrics.likelihood import predict_by_steps
from fewlines.models.checkpoint import load_network, load_shape, load_tokenizer, save_network
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.models.llamagen.model import Transformer, rope_2d, rotate
from fewlines.models.llamagen.shape import TransformerShape
from fewlines.models.pixels import PixelShape, PixelTokenizer
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape, to_bytes, to_signed
from fewlines.models.two_level import TwoLevelTokenizer

SHAPE = TokenizerShape(channels=3, widths=(4, 8, 8), blocks=1, codes=16, code_dim=4)


def test_a_file_that_says_no_network_is_said_before_it_is_read(tmp_path):
    write_tensors(tmp_path / "others", {"weight": torch.zeros(2)})
    with pytest.raises(FewlinesError, match="does not say what network it holds"):
        load_shape(tmp_path / "others")
    save_network(tmp_path / "model", tiny_transformer())
    cls, shape = load_shape(tmp_path / "model")
    assert (cls, shape.dim) == (Transformer, 32)


def test_parameter_names_and_sizes_are_llamagens():
    with torch.device("meta"):
        model = Transformer(TransformerShape(768, 12, 12, 12, 16384, 1000, (16, 16)))
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert names["cls_embedding.embedding_table.weight"] == (1001, 768)
    assert names["tok_embeddings.weight"] == (16384, 768)
    assert names["layers.11.attention.wqkv.weight"] == (2304, 768)
    assert names["layers.0.attention.wo.weight"] == (768, 768)
    assert names["layers.0.feed_forward.w1.weight"] == (2048, 768)
    assert names["layers.0.feed_forward.w2.weight"] == (768, 2048)
    assert names["output.weight"] == (16384, 768)
    assert {"norm.weight", "layers.3.attention_norm.weight", "layers.3.ffn_norm.weight"} <= set(
        names
    )
    assert sum(p.numel() for p in model.parameters()) == 110_888_448  # LlamaGen-B, 111M


def test_rotations_keep_the_relative_place_and_silence_the_class_token():
    shape = TransformerShape(16, 1, 1, 1, 8, 2, grid=(5, 6))
    rotation = rope_2d(shape)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)
    turned_q = rotate(q.expand(1, 31, 1, 16), rotation)[0, :, 0]
    turned_k = rotate(k.expand(1, 31, 1, 16), rotation)[0, :, 0]
    assert not turned_k[0].any()
    products = (turned_q[1:] @ turned_k[1:].T).view(5, 6, 5, 6)
    torch.testing.assert_close(products[1, 2, 0, 4], products[4, 0, 3, 2])  # one up, two right
    torch.testing.assert_close(turned_k[1:].norm(dim=-1), k.norm().expand(30))


def test_a_position_sees_nothing_after_it():
    model = tiny_transformer()
    codes = torch.randint(16, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 16
    labels = torch.tensor([1])
    before, after = model.teacher_forced(labels, codes), model.teacher_forced(labels, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("levels", [2, 5, 200, 256])
def test_grey_levels_are_tokens_of_a_pixel_each(levels, tmp_path):
    tokenizer = PixelTokenizer(PixelShape(1, levels))
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codes = tokenizer.encode(grey)
    expected = [int((value + 0.5) * levels / 256) for value in range(256)]
    assert codes.flatten().tolist() == expected
    drawn = tokenizer.decode(codes)
    assert (drawn.int() - grey.int()).abs().max() <= 128 / levels + 1
    assert torch.equal(drawn, grey) == (levels == 256)
    assert torch.equal(tokenizer.encode(drawn), codes)
    save_network(tmp_path / "t", tokenizer)
    assert torch.equal(load_tokenizer(tmp_path / "t").decode(codes), drawn)


def test_every_second_token_of_every_second_line_is_an_upper_one(tmp_path):
    """It sees twice as far, decides what the lower codes are given, and is drawn around itself."""
    torch.manual_seed(0)
    shape = TokenizerShape(channels=1, widths=(4, 8), blocks=0, codes=64, code_dim=4)
    tokenizer = TwoLevelTokenizer(shape).eval()
    picture = torch.randint(256, (1, 1, 16, 16), dtype=torch.uint8)
    image = to_signed(picture).requires_grad_()

    def see_lower(x):
        return tokenizer.lower(tokenizer.encoder(x))

    def count_seen(of):
        (gradient,) = torch.autograd.grad(of(image)[0, :, 4, 4].sum(), image)
        return gradient.count_nonzero()

    assert count_seen(tokenizer.compress) > count_seen(see_lower)
    codes = tokenizer.encode(picture)
    assert codes.shape == (1, 8, 8)
    below = tokenizer.compress(image)[0, :, 3, 3].sum()
    assert torch.autograd.grad(below, tokenizer.upper[0].weight)[0].any()  # given the upper ones
    upper = tokenizer.quantizer(tokenizer.upper(tokenizer.encoder(image)))
    assert torch.equal(codes[:, ::2, ::2], upper.indices)

    def reach(row, column):
        other = codes.clone()
        other[0, row, column] = (other[0, row, column] + 1) % 64
        moved = tokenizer.draw_images(other) != tokenizer.draw_images(codes)
        return int(moved.sum())

    assert reach(4, 4) > reach(3, 3)
    save_network(tmp_path / "t", tokenizer)
    assert torch.equal(load_tokenizer(tmp_path / "t").decode(codes), tokenizer.decode(codes))


def test_two_levels_need_even_grids():
    shape = TokenizerShape(channels=1, widths=(4, 8), blocks=0, codes=64, code_dim=4)
    tokenizer = TwoLevelTokenizer(shape).eval()
    with pytest.raises(FewlinesError, match="a grid of 5×6 tokens; both sides must be even"):
        tokenizer.encode(torch.zeros(1, 1, 10, 12, dtype=torch.uint8))
    with pytest.raises(FewlinesError, match="a grid of 6×5 tokens"):
        tokenizer.decode(torch.zeros(1, 6, 5, dtype=torch.long))


def test_a_pixel_of_several_channels_is_no_token():
    with pytest.raises(FewlinesError, match=r"tokenizer\.levels: images of 3 channels"):
        PixelShape(3, 256)


def test_the_tokenizer_halves_the_side_per_level_and_survives_its_batches():
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(SHAPE).eval()
    images = torch.randint(256, (5, 3, 16, 24), dtype=torch.uint8)
    indices = tokenizer.encode(images, batch=2)
    assert indices.shape == (5, 4, 6)
    assert torch.equal(indices, tokenizer.encode(images))
    assert tokenizer.decode(indices, batch=2).shape == images.shape
    assert torch.equal(to_bytes(to_signed(images)), images)


def test_a_code_that_is_replaced_reaches_the_decoder():
    quantizer = ConvTokenizer(SHAPE).quantizer
    z = torch.randn(1, 4, 2, 2)
    replace = torch.tensor([[[-1, 7], [-1, -1]]])
    codes = quantizer(z, 0.25, replace).codes[0].flatten(1).T  # (4, D)
    nearest = quantizer(z, 0.25).codes[0].flatten(1).T
    torch.testing.assert_close(codes[1], quantizer.codebook[7])
    torch.testing.assert_close(codes[[0, 2, 3]], nearest[[0, 2, 3]])


@pytest.mark.parametrize(
    "network",
    [tiny_transformer(), ConvTokenizer(SHAPE), Classifier(ClassifierShape(1, (4, 8), 16, 10))],
    ids=lambda network: type(network).__name__,
)
def test_a_network_survives_its_file(network, tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path, network)
    again = load_network(path, type(network))
    assert again.shape == network.shape
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_wrong_checkpoints_are_told_apart(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FewlinesError, match="does not exist"):
        fewlines.load_model(path)
    save_network(path, ConvTokenizer(SHAPE))
    with pytest.raises(FewlinesError, match="holds a tokenizer, not a model"):
        fewlines.load_model(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FewlinesError, match="not a complete safetensors file"):
        fewlines.load_model(path)
    write_tensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(FewlinesError, match="not a file of fewlines"):
        fewlines.load_model(path)
    save_network(path, tiny_transformer())
    with pytest.raises(FewlinesError, match=r"is a model of ours, .* leave out side, part"):
        fewlines.load_model(path, side=16, part="ema", heads=None)
    model = fewlines.load_model(path)
    model.shape = TransformerShape(**{**vars(model.shape), "codes": 99})
    save_network(path, model)
    with pytest.raises(FewlinesError, match=r"another architecture .*size mismatch"):
        fewlines.load_model(path)


def test_registers_are_kept_and_nothing_else_changes(model):
    """A model with registers decodes as its parallel forward says, under any cache; without them
    it is the published one, name for name."""
    twin = model.with_registers(3, torch.Generator().manual_seed(0)).requires_grad_(False)
    assert set(twin.state_dict()) - set(model.state_dict()) == {"registers"}
    assert twin.shape.geometry.prefix == model.shape.geometry.prefix + 3
    codes = torch.randint(16, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3)
    cache = fewlines.cache("lines", lines=1, merge=True)
    plan = cache.plan(twin.shape.geometry)
    assert (
        plan.count_entries()
        - fewlines.cache("lines", lines=1, merge=True).plan(model.shape.geometry).count_entries()
        == 3 * 2 * model.shape.kv_heads
    )
    parallel = twin.teacher_forced(labels, codes, TeacherForced(plan))
    assert parallel.shape == (3, 20, 16)
    torch.testing.assert_close(
        predict_by_steps(twin, labels, codes, cache), parallel, atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(
        twin.teacher_forced(labels, codes), model.teacher_forced(labels, codes)
    )
