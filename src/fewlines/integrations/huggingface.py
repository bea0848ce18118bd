"""The same weights as a Hugging Face Llama, and its `generate`: a peer to measure against.

Needs the extra `transformers`. A Llama turns a head's first half against its second where
LlamaGen turns neighbours, so the rows of queries and keys change places; its rotary embedding is
replaced by one that reads our two-dimensional table. Nothing else differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from fewlines import machine
from fewlines.cache.spec import Cache
from fewlines.geometry import Geometry
from fewlines.integrations.transformers import FewLinesCache
from fewlines.models.llamagen.model import Transformer
from fewlines.models.llamagen.shape import TransformerShape


class RasterRotary(nn.Module):
    """Cosines and sines `(B, T, D)` of positions `(B, T)`, by the table of the transformer."""

    def __init__(self, rotations: Tensor) -> None:
        super().__init__()
        twice = torch.cat([rotations, rotations], dim=1)  # (P + N, D, 2)
        self.cos, self.sin = nn.Buffer(twice[..., 0]), nn.Buffer(twice[..., 1])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look up cosines and sines `(B, T, D)` of positions `(B, T)`."""
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


def make_llama(model: Transformer) -> LlamaForCausalLM:
    """Make a Llama with the model's own weights, in the precision of its matrices. Embedded labels
    go in as `inputs_embeds`, codes come out."""
    shape = model.shape
    config = LlamaConfig(
        vocab_size=shape.codes,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=shape.geometry.prefix + shape.geometry.n_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    precision = model.output.weight.dtype
    llama.load_state_dict(_weights(model), strict=True, assign=True)
    llama.model.rotary_emb = RasterRotary(model.rotations)
    return llama.to(precision).eval().requires_grad_(False)


def _weights(model: Transformer) -> dict[str, Tensor]:
    shape, ours = model.shape, model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    queries = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    for layer in range(shape.layers):
        block, name = f"layers.{layer}.", f"model.layers.{layer}."
        q, k, v = ours[f"{block}attention.wqkv.weight"].split(queries)
        theirs |= {
            f"{name}self_attn.q_proj.weight": _halves(q, shape),
            f"{name}self_attn.k_proj.weight": _halves(k, shape),
            f"{name}self_attn.v_proj.weight": v,
            f"{name}self_attn.o_proj.weight": ours[f"{block}attention.wo.weight"],
            f"{name}mlp.gate_proj.weight": ours[f"{block}feed_forward.w1.weight"],
            f"{name}mlp.up_proj.weight": ours[f"{block}feed_forward.w3.weight"],
            f"{name}mlp.down_proj.weight": ours[f"{block}feed_forward.w2.weight"],
            f"{name}input_layernorm.weight": ours[f"{block}attention_norm.weight"],
            f"{name}post_attention_layernorm.weight": ours[f"{block}ffn_norm.weight"],
        }
    return theirs


def _halves(weight: Tensor, shape: TransformerShape) -> Tensor:
    """Rows of neighbouring pairs `(a0, b0, a1, b1, …)` of each head as `(a0, a1, …, b0, b1, …)`."""
    pairs = weight.unflatten(0, (-1, shape.head_dim // 2, 2))
    halves: Tensor = pairs.transpose(1, 2).flatten(0, 2).contiguous()
    return halves


def generate_codes(llama: LlamaForCausalLM, prefix: Tensor, n_tokens: int, cache: Any) -> Tensor:
    """Draw greedy codes `(B, N)` after an embedded prefix `(B, P, dim)`, by `generate`."""
    return llama.generate(  # type: ignore[no-any-return]
        inputs_embeds=prefix.to(llama.dtype),
        attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
        max_new_tokens=n_tokens,
        do_sample=False,
        cache=cache,
    )


class LlamaSteps:
    """Steps of `generate`, timed from any position on a cache filled with random numbers."""

    def __init__(
        self,
        llama: LlamaForCausalLM,
        batch: int,
        geometry: Geometry,
        engine: str,
        steps: int,
        cache: Cache,
        storage: torch.dtype | None = None,
    ) -> None:
        """Begin.

        Args:
            llama: the model.
            batch: rows.
            geometry: of its images.
            engine: `hf-dynamic`, `hf-static` or `hf-fewlines`: whose cache.
            steps: that are timed at a position.
            cache: what stays, of `hf-fewlines`.
            storage: what that keeps it in.
        """
        self.llama, self.batch, self.geometry = llama, batch, geometry
        self.engine, self.steps, self.cache, self.storage = engine, steps, cache, storage

    def make_cache(self, entries: int) -> Any:
        """Make a cache for `entries` positions: all of it at once, growing, or of a few lines."""
        config = self.llama.config
        if self.engine == "hf-static":
            return StaticCache(config, max_cache_len=entries)
        if self.engine == "hf-dynamic":
            return DynamicCache(config=config)
        return FewLinesCache(self.llama, self.cache, grid=self.geometry.grid, storage=self.storage)

    def seconds(self, position: int) -> float:
        """Time a step, from image token `position` on."""
        entries = self.geometry.prefix + position
        cache = self._filled(entries)
        self._continue(cache, entries, 1)
        several = partial(self._continue, cache, entries + 1, self.steps)
        return machine.take_seconds(several) / self.steps

    def whole(self) -> float:
        """Time a whole batch."""
        n_tokens = self.geometry.n_tokens
        prefix = torch.zeros(self.batch, self.geometry.prefix, self.llama.config.hidden_size)
        cache = self.make_cache(self.geometry.prefix + n_tokens)
        prefix = prefix.to(machine.device())
        return machine.take_seconds(partial(generate_codes, self.llama, prefix, n_tokens, cache))

    def _filled(self, entries: int) -> Any:
        config, total = self.llama.config, self.geometry.prefix + self.geometry.n_tokens
        cache = self.make_cache(total)
        if isinstance(cache, FewLinesCache):
            cache.seek(entries, self.geometry.prefix, self.batch)
            return cache
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(config.head_dim, generator=generator).to(
            self.llama.device, self.llama.dtype
        )
        shape = (self.batch, config.num_key_value_heads, entries, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(row.expand(shape), row.expand(shape), layer)
        return cache

    def _continue(self, cache: Any, entries: int, steps: int) -> None:
        shape = (self.batch, entries + 1)
        self.llama.generate(
            input_ids=torch.zeros(shape, dtype=torch.long, device=self.llama.device),
            attention_mask=torch.ones(shape, dtype=torch.long, device=self.llama.device),
            max_new_tokens=steps,
            do_sample=False,
            cache=cache,
        )
