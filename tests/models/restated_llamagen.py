"""LlamaGen restated from its description (arXiv 2406.06525), as plainly as can be: no cache, no
modules, a token at a time from the whole image so far. It shares no line with the package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def predict(w: Weights, heads: int, side: int, condition: Tensor, codes: list[int]) -> Tensor:
    """Logits `(V,)` of the token after these codes and the vectors `(P, dim)` of a condition."""
    dim = w["norm.weight"].numel()
    size = dim // heads
    x = torch.cat([condition, w["tok_embeddings.weight"][codes]])
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for layer in range(layers):
        p = f"layers.{layer}."
        y = normalise(x, w[p + "attention_norm.weight"])
        qkv = y @ w[p + "attention.wqkv.weight"].T
        kv_heads = (qkv.shape[1] - dim) // 2 // size
        q, k, v = qkv.split([dim, kv_heads * size, kv_heads * size], dim=1)
        out = torch.zeros(len(x), dim)
        for head in range(heads):
            shared = head * kv_heads // heads
            mine = slice(head * size, (head + 1) * size)
            theirs = slice(shared * size, (shared + 1) * size)
            for i in range(len(x)):
                query = turn(q[i, mine], i - len(condition), side)
                keys = torch.stack(
                    [turn(k[j, theirs], j - len(condition), side) for j in range(i + 1)]
                )
                chance = (keys @ query / math.sqrt(size)).softmax(0)
                out[i, mine] = chance @ v[: i + 1, theirs]
        x = x + out @ w[p + "attention.wo.weight"].T
        y = normalise(x, w[p + "ffn_norm.weight"])
        gate = y @ w[p + "feed_forward.w1.weight"].T
        up = y @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "feed_forward.w2.weight"].T
    return normalise(x[-1:], w["norm.weight"])[0] @ w["output.weight"].T


def normalise(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turn(vector: Tensor, position: int, side: int) -> Tensor:
    """Pairs of neighbours turned by their place: the first half of a head by the row, the second by
    the column. A condition has no place: its vectors become zeros."""
    if position < 0:
        return torch.zeros_like(vector)
    row, column = divmod(position, side)
    quarter = len(vector) // 4
    out = torch.empty_like(vector)
    for pair in range(2 * quarter):
        place, number = (row, pair) if pair < quarter else (column, pair - quarter)
        angle = place * 10000.0 ** (-2 * number / (len(vector) / 2))
        a, b = float(vector[2 * pair]), float(vector[2 * pair + 1])
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def find_class(w: Weights, label: int) -> Tensor:
    return w["cls_embedding.embedding_table.weight"][[label]]


def project(w: Weights, features: Tensor) -> Tensor:
    """A caption's features `(P, F)` as vectors of the model."""
    inner = features @ w["cls_embedding.cap_proj.fc1.weight"].T
    cubed = inner + 0.044715 * inner**3
    inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * cubed).tanh())
    return inner @ w["cls_embedding.cap_proj.fc2.weight"].T


def draw(
    w: Weights,
    heads: int,
    grid: tuple[int, int],
    condition: Tensor,
    nothing: Tensor,
    scale: float,
    interval: int = -1,
) -> list[int]:
    """The likeliest codes, guided by what stands for no condition; after the first, tokens are
    guided while they are counted, from 0, up to `interval`."""
    codes: list[int] = []
    for token in range(grid[0] * grid[1]):
        logits = predict(w, heads, grid[1], condition, codes)
        if scale != 1 and not -1 < interval < token - 1:
            without = predict(w, heads, grid[1], nothing, codes)
            logits = without + scale * (logits - without)
        codes.append(int(logits.argmax()))
    return codes


def convolve(w: Weights, name: str, x: Tensor, **how: int) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def group(w: Weights, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(32, -1)
    mean, variance = groups.mean(1, keepdim=True), groups.var(1, correction=0, keepdim=True)
    even = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    return even * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def residual(w: Weights, p: str, x: Tensor) -> Tensor:
    y = convolve(w, f"{p}.conv1", swish(group(w, f"{p}.norm1", x)), padding=1)
    y = convolve(w, f"{p}.conv2", swish(group(w, f"{p}.norm2", y)), padding=1)
    return y + (convolve(w, f"{p}.nin_shortcut", x) if f"{p}.nin_shortcut.weight" in w else x)


def attend(w: Weights, p: str, x: Tensor) -> Tensor:
    y = group(w, f"{p}.norm", x)
    q, k, v = (convolve(w, f"{p}.{part}", y).flatten(1) for part in "qkv")
    chance = (q.T @ k / math.sqrt(len(q))).softmax(1)
    return x + convolve(w, f"{p}.proj_out", (v @ chance.T).reshape(x.shape))


def middle(w: Weights, p: str, x: Tensor) -> Tensor:
    return residual(w, f"{p}.mid.2", attend(w, f"{p}.mid.1", residual(w, f"{p}.mid.0", x)))


def level(w: Weights, p: str, x: Tensor) -> Tensor:
    number = 0
    while f"{p}.res.{number}.conv1.weight" in w:
        x = residual(w, f"{p}.res.{number}", x)
        if f"{p}.attn.{number}.q.weight" in w:
            x = attend(w, f"{p}.attn.{number}", x)
        number += 1
    return x


def encode(w: Weights, image: Tensor) -> Tensor:
    """Indices `(h, w)` of an image `(3, H, W)` in [−1, 1]."""
    x, number = convolve(w, "encoder.conv_in", image, padding=1), 0
    while f"encoder.conv_blocks.{number}.res.0.conv1.weight" in w:
        p = f"encoder.conv_blocks.{number}"
        x = level(w, p, x)
        if f"{p}.downsample.conv.weight" in w:
            x = convolve(w, f"{p}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        number += 1
    x = swish(group(w, "encoder.norm_out", middle(w, "encoder", x)))
    z = convolve(w, "quant_conv", convolve(w, "encoder.conv_out", x, padding=1))
    z = z / z.norm(dim=0)
    book = w["quantize.embedding.weight"]
    book = book / book.norm(dim=1, keepdim=True)
    distance = (z[None] - book[:, :, None, None]).square().sum(1)
    return distance.argmin(0)


def decode(w: Weights, indices: Tensor) -> Tensor:
    """An image `(3, H, W)` of indices `(h, w)`."""
    book = w["quantize.embedding.weight"]
    z = (book / book.norm(dim=1, keepdim=True))[indices].permute(2, 0, 1)
    x = convolve(w, "decoder.conv_in", convolve(w, "post_quant_conv", z), padding=1)
    x, number = middle(w, "decoder", x), 0
    while f"decoder.conv_blocks.{number}.res.0.conv1.weight" in w:
        p = f"decoder.conv_blocks.{number}"
        x = level(w, p, x)
        if f"{p}.upsample.conv.weight" in w:
            x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            x = convolve(w, f"{p}.upsample.conv", x, padding=1)
        number += 1
    return convolve(w, "decoder.conv_out", swish(group(w, "decoder.norm_out", x)), padding=1)
