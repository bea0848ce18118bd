"""A cache of a few lines for models of transformers that draw images in raster order:
`model.generate(..., cache=FewLinesCache(model, "streaming", lines=4))`.

Keys and values go through the model's own `update`; which of them stay, and the attention over
those that did, are ours. For that the model's attention is set to a function of ours, which leaves
every other cache to transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fewlines.attention.attend import Attend
from fewlines.attention.buffer import BoundedCache
from fewlines.cache.plan import EvictionPlan
from fewlines.cache.schedule import Schedule
from fewlines.cache.spec import Cache, make_cache
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry

NAME = "fewlines"  # of the attention, in a model's configuration
MARK = "_fewlines_cache"  # on the keys that `update` hands on
TAILS = {"emu3": 3}  # tokens after an image: end of image, end of sequence, padding
FOREIGN = ("softcap", "sliding_window", "s_aux", "position_bias")  # that no engine of ours has


class FewLinesCache(transformers.Cache):  # type: ignore[misc]
    """What a model of transformers keeps of an image: for one call of `generate`."""

    def __init__(
        self,
        model: Any,
        policy: str | Cache | None = None,
        *,
        grid: tuple[int, int] | None = None,
        schedule: str | Path | Schedule | None = None,
        tail: int | None = None,
        storage: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Make the cache, and set the model's attention to one that knows it.

        Args:
            model: that draws, of transformers.
            policy: the name of a policy, whose budget, merging and options follow as in
                `fewlines.cache`; or what that returned; or nothing beside a schedule.
            grid: lines of an image and tokens of a line, its end-of-line token counted; that of the
                model's configuration if it says.
            schedule: what `fewlines calibrate --transformers` wrote for this model.
            tail: tokens that the model draws after the image and that need not be remembered.
            storage: what keys and values are kept in; the model's own precision where None.
            options: `lines`, `fraction` or `tokens`, `merge`, `allocation`, `calibration` and what
                the policy takes.

        Raises:
            FewlinesError: the parts do not go together, or the model has no such cache.
        """
        super().__init__(layers=[])
        devices = {str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            raise FewlinesError(
                "FewLinesCache: this model is spread over "
                f"{', '.join(sorted(devices))}; load it on one device"
            )
        self.geometry = find_geometry(model, grid)
        self.head_dim = _find_head_dim(model)
        self.limited = _read_cache(policy, schedule, options)
        if isinstance(self.limited, Schedule):
            self.limited.check_weights(model)
        self.made = self.limited.plan(self.geometry)
        self.tail = TAILS.get(model.config.model_type, 0) if tail is None else tail
        self.precision, self.device = storage or model.dtype, model.device
        set_attention(model)
        self.reset()

    # What transformers asks of a cache.

    def __len__(self) -> int:
        """Layers of the model."""
        return self.geometry.layers

    def reset(self) -> None:
        """Forget the image, for another one."""
        self.buffers: BoundedCache | None = None
        self.seen = 0
        self.waiting: int | None = None
        self.start: Tensor | int | None = None  # of positions; None: no token has come yet

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        kwargs: Mapping[str, Any] | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values `(B, H, T, D)` of a layer to its attention; `kwargs`, what
        its attention is given beside them, has their positions where the model hands them on."""
        if self.waiting is not None:
            raise FewlinesError(
                f"FewLinesCache: layer {self.waiting} did not ask this cache: the model's "
                "attention is not the one that FewLinesCache set; set no other while it draws"
            )
        if layer_idx == 0:
            self._go_on(key_states, (kwargs or {}).get("position_ids"))
        self.waiting = layer_idx
        setattr(key_states, MARK, self)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, all that have come: positions are counted by it."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Entries that a mask would have if everything were kept, and where they begin."""
        if self.buffers is not None:
            self._refuse_several(query_length)
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Nothing is set beforehand: a prompt may have any length."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """No layer has a window of its own."""
        return [False] * len(self)

    is_linear = is_dummy = is_sliding

    @property
    def is_compileable(self) -> bool:
        """The host decides what is overwritten, so `generate` must not compile."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a prompt has come."""
        return self.buffers is not None

    @property
    def is_croppable(self) -> bool:
        """What was evicted does not come back."""
        return False

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise FewlinesError(
            "FewLinesCache: beams, assisted decoding and contrastive search go back to tokens that "
            "may be evicted; draw with num_beams=1 and without an assistant"
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse

    # What it holds.

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that are held for the batch."""
        return 0 if self.buffers is None else self.buffers.bytes

    def count_bytes(self, prompt: int, rows: int, storage: torch.dtype) -> int:
        """Count the bytes that a batch will hold after a prompt of so many tokens."""
        return rows * _with_prefix(self.made, prompt).count_bytes(self.head_dim, storage)

    def seek(self, entries: int, prompt: int, rows: int) -> None:
        """Go where `entries` tokens have come, on random keys and values: for instruments."""
        self.buffers = self._make_buffers(prompt, rows, self.device)
        self.buffers.fill(torch.Generator().manual_seed(1))
        self.buffers.seek(entries - prompt)
        self.seen = entries

    def _make_buffers(self, prompt: int, rows: int, device: torch.device) -> BoundedCache:
        plan = _with_prefix(self.made, prompt)
        return BoundedCache(plan, rows, self.head_dim, self.precision, device)

    def _go_on(self, keys: Tensor, positions: Tensor | None) -> None:
        """To the token, or the prompt, whose keys `(B, H, T, D)` the first layer brings."""
        rows, heads, tokens, head_dim = keys.shape
        if self.buffers is None:
            if (heads, head_dim) != (self.geometry.heads, self.head_dim):
                raise FewlinesError(
                    f"FewLinesCache: keys of {heads} heads of {head_dim}, where the model's "
                    f"configuration says {self.geometry.heads} of {self.head_dim}"
                )
            self.buffers = self._make_buffers(tokens, rows, keys.device)
            self.seen = tokens
            return
        self._refuse_several(tokens, rows)
        if positions is not None and positions.ndim == 2:
            self._check_position(positions[:, -1])
        step, n = self.seen - self.buffers.plan.geometry.prefix, self.geometry.n_tokens
        if step >= n + self.tail:
            raise FewlinesError(
                f"FewLinesCache: all {n} tokens of the image have come, and {self.tail} after it; "
                "end generate there, or say how many follow by tail"
            )
        if step < n:
            self.buffers.advance(step)
        else:
            self.buffers.stay()
        self.seen += 1

    def _refuse_several(self, tokens: int, rows: int | None = None) -> None:
        assert self.buffers is not None
        held = len(self.buffers.first)
        if tokens != 1 or rows not in (None, held):
            raise FewlinesError(
                f"FewLinesCache: {tokens} tokens of {rows or held} rows came after a prompt that "
                f"is in this cache with {held} rows; make a new one for every call of generate, "
                "and leave out prefill_chunk_size and assistants"
            )

    def _check_position(self, here: Tensor) -> None:
        """Refuse a position `(1 or B,)` of the new token that is of another call. Padding counts or
        not, as it did for the first token."""
        assert self.buffers is not None
        padding: list[Tensor | int] = [0, self.buffers.first]  # counted, or not
        starts = padding if self.start is None else [self.start]
        fits = [start for start in starts if bool((here == self.seen - start).all())]
        if not fits:
            raise FewlinesError(
                f"FewLinesCache: a token of position {int(here.max())} came where {self.seen} were "
                "read; make a new one for every call of generate, or reset this one"
            )
        self.start = fits[0]  # where both fit there is no padding, and they are one

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any
    ) -> Tensor:
        """Attend in the layer whose keys have just come; `(B, Hq, T, D)`."""
        layer, self.waiting = self.waiting, None
        assert layer is not None
        assert self.buffers is not None
        _refuse_foreign(how)
        if self.buffers.position == 0 and q.shape[2] == self.buffers.plan.geometry.prefix:
            if layer == 0 and mask is not None:
                self.buffers.pad(_find_first(mask))
            self.buffers.write_prefix(layer, k, v)
            y: Tensor = sdpa_attention_forward(module, q, k, v, mask, **how)[0].transpose(1, 2)
            return y
        scale = how.get("scaling") or self.head_dim**-0.5
        if not math.isclose(scale, self.head_dim**-0.5):
            q = q * (scale * self.head_dim**0.5)
        if q.device.type == "cpu":  # whose kernel computes in float32
            of = torch.promote_types(q.dtype, torch.float32)
            return self.buffers(layer, q.to(of), k.to(of), v.to(of)).to(q.dtype)
        return self.buffers(layer, q, k, v)


def _find_first(mask: Tensor) -> Tensor:
    """Where each row's prompt begins, `(B,)`, by its mask `(B, 1, T, T)`."""
    last = mask[:, 0, -1]  # what the last token of the prompt sees
    there = (last if last.dtype == torch.bool else last == 0).long()
    first = there.argmax(1)
    if not bool((there.sum(1) == there.shape[1] - first).all()):
        raise FewlinesError(
            "FewLinesCache: a prompt is padded on the right or within; write "
            "padding_side='left' in its tokenizer"
        )
    return first


def _with_prefix(plan: EvictionPlan, prefix: int) -> EvictionPlan:
    return replace(plan, geometry=replace(plan.geometry, prefix=prefix))


def _read_cache(
    policy: str | Cache | None, schedule: str | Path | Schedule | None, options: Mapping[str, Any]
) -> Cache | Schedule:
    """The cache that was named, or its schedule, which must be of that cache."""
    if isinstance(schedule, str | Path):
        schedule = Schedule.load(Path(schedule))
    if policy is None:
        if schedule is None:
            raise FewlinesError('FewLinesCache: name a policy, such as "streaming", or a schedule')
        return schedule
    if isinstance(policy, Cache):
        if options:
            raise FewlinesError(
                f"FewLinesCache: {', '.join(options)} beside a cache that is made; leave them out"
            )
        named = policy
    else:
        named = make_cache(policy, **options)
    if schedule is not None and schedule.slug != named.slug:
        raise FewlinesError(
            f"FewLinesCache: the schedule is of {schedule.slug}, not of {named.slug}; name that, "
            "or make another schedule"
        )
    return schedule or named


def find_geometry(model: Any, grid: tuple[int, int] | None = None) -> Geometry:
    """Find what a cache has to know of a model; its prompt is taken as one token.

    Args:
        model: of transformers.
        grid: lines of an image and tokens of a line; that of the configuration if it says.

    Raises:
        FewlinesError: nobody says how many tokens an image has.
    """
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Geometry(grid or _find_grid(model), 1, int(text.num_hidden_layers), int(heads))


def _find_head_dim(model: Any) -> int:
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _find_grid(model: Any) -> tuple[int, int]:
    """Find the square grid of a model that says how many tokens its images have."""
    vision = getattr(model.config, "vision_config", None)
    count = getattr(vision, "num_image_tokens", None)
    side = math.isqrt(count) if isinstance(count, int) else 0
    if side == 0 or side * side != count:
        raise FewlinesError(
            f"FewLinesCache: {model.config.model_type} does not say how many tokens its images "
            "have; write grid=(lines, tokens of a line), an end-of-line token counted"
        )
    return side, side


def set_attention(model: Any, name: str = NAME) -> None:
    """Set the attention of the model's decoder; its vision tower keeps its own."""
    config = model.config
    text = config.get_text_config(decoder=True)
    parts = [part for part in config.sub_configs if getattr(config, part) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)


_attend: ContextVar[Attend | None] = ContextVar("attend", default=None)


def _refuse_foreign(how: dict[str, Any]) -> None:
    for name in FOREIGN:
        if how.get(name) is not None:
            raise FewlinesError(
                f"FewLinesCache: this model's attention has {name}, which no engine here has"
            )


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Let the layers of models that run without a cache take their attention from `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its attention functions: with the cache that the keys went
    through, or as `sdpa` where that is another."""
    cache = getattr(key, MARK, None)
    if cache is not None:
        return cache.attend(module, query, key, value, attention_mask, **how).transpose(1, 2), None
    given = _attend.get()
    if given is not None:
        _refuse_foreign(how)
        query = query * ((how.get("scaling") or query.shape[-1] ** -0.5) * query.shape[-1] ** 0.5)
        return given(int(module.layer_idx), query, key, value).transpose(1, 2), None  # type: ignore[arg-type]
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **how
    )
    return found


transformers.AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # or no mask is made, and padding is attended to


def make_guidance(
    model: Any, scale: float, prompt: Tensor, mask: Tensor | None, cache: FewLinesCache
) -> Any:
    """Make the processor of classifier-free guidance that `generate` would make, with a bounded
    cache for its unconditional rows as well: by itself it takes a DynamicCache for them.

    Args:
        model: that draws.
        scale: of guidance.
        prompt: ids of the unconditional prompts, `(B, T)`.
        mask: what of them is no padding.
        cache: of its own, beside that of `generate`.

    Returns:
        A logits processor; leave out `guidance_scale` beside it.
    """
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale, model, unconditional_ids=prompt, unconditional_attention_mask=mask
    )
    guidance.unconditional_context["cache"] = cache
    return guidance
