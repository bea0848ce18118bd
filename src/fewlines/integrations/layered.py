"""A decoder of transformers as calibration looks at it: layer by layer, with attention that its
caller brings. And the images that it draws to be calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fewlines.attention.attend import Attend, attend_causally
from fewlines.errors import FewlinesError
from fewlines.geometry import Geometry
from fewlines.integrations.transformers import attending, find_geometry, set_attention

EMU3_SIDE = 8  # pixels of a token's side


class LayeredDecoder:
    """A model with prompts of one length, which stand where class numbers stand elsewhere: an
    `AttentionModel`, as far as calibration needs one."""

    def __init__(self, model: Any, prompts: Tensor, grid: tuple[int, int] | None = None) -> None:
        """Look at a model.

        Args:
            model: of transformers, whose decoder is built as Llama's is.
            prompts: ids `(p, T)`.
            grid: of its images; that of its configuration if it says.

        Raises:
            FewlinesError: its decoder is built otherwise.
        """
        self.model, self.decoder = model, model.get_decoder()
        self.prompts = prompts.to(self.decoder.device)
        missing = [
            name for name in ("layers", "norm", "rotary_emb") if not hasattr(self.decoder, name)
        ]
        if missing:
            raise FewlinesError(
                f"{model.config.model_type} has no {missing[0]} in its decoder; calibration knows "
                "decoders that are built as Llama's is"
            )
        found = find_geometry(model, grid)
        self.geometry = Geometry(found.grid, prompts.shape[1], found.layers, found.heads)
        set_attention(model)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        device: torch.device = self.decoder.device
        return device

    def embed(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Embed prompts by their numbers `(B,)` and all codes `(B, N)` but the last."""
        prompts = self.model.get_input_embeddings()(self.prompts[labels])
        return torch.cat([prompts, _embed_codes(self.model, codes[:, :-1])], dim=1)

    def run_layers(
        self, x: Tensor, attend: Attend | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Run some layers on all positions."""
        places = torch.arange(x.shape[1], device=x.device)[None]
        rotation = self.decoder.rotary_emb(x, position_ids=places)
        with attending(attend or attend_causally):
            for layer in self.decoder.layers[first:last]:
                made = layer(x, position_embeddings=rotation, position_ids=places)
                x = made[0] if isinstance(made, tuple) else made
        return x

    def read_out(self, x: Tensor) -> Tensor:
        """Logits `(B, N, V)` of what has been through all layers."""
        x = self.decoder.norm(x)[:, self.geometry.prefix - 1 :]
        head = getattr(self.model.base_model, "generation_head", None) or self.model.lm_head
        logits: Tensor = head(x)
        return logits


def _embed_codes(model: Any, codes: Tensor) -> Tensor:
    """Embed codes that have a table of their own, or are ids like any other."""
    codes = codes.to(model.device)
    if hasattr(model, "prepare_embeddings_for_image_generation"):
        embedded: Tensor = model.prepare_embeddings_for_image_generation(codes)
    else:
        embedded = model.get_input_embeddings()(codes)
    return embedded


def load_pretrained(path: Path) -> Any:
    """Load a model of transformers from a folder, from safetensors alone.

    Raises:
        FewlinesError: there is no such folder, or no model in it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        name = (config.architectures or [""])[0]
        cls = getattr(transformers, name)
        model = cls.from_pretrained(path, dtype="auto", use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        said = str(error).splitlines()[0]
        raise FewlinesError(f"{path} holds no model of transformers ({said})") from None
    return model.eval().requires_grad_(False)


def read_prompts(path: Path, model_path: Path, model: Any, geometry: Geometry) -> list[Tensor]:
    """Read prompts, a line each, as ids `(1, T)`; in a chat template where the model draws by one.

    Args:
        path: a text file.
        model_path: the folder of the model, which has its tokenizer.
        model: that draws.
        geometry: of its images, whose size some prompts say.

    Raises:
        FewlinesError: there are none, or the model has no tokenizer.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise FewlinesError(f"{path} has no prompts; write one a line")
    kind: Any = transformers.AutoProcessor
    how: dict[str, Any]
    if model.config.model_type == "janus":
        how = {"generation_mode": "image"}
    elif model.config.model_type == "emu3":
        height, width = geometry.grid[0], geometry.grid[1] - 1
        area = height * width * EMU3_SIDE**2
        how = {
            "return_for_image_generation": True,
            "ratio": f"{width}:{height}",
            "image_area": area,
        }
    else:
        kind, how = transformers.AutoTokenizer, {}
    try:
        read = kind.from_pretrained(model_path, local_files_only=True)
        if model.config.model_type == "janus" and read.chat_template:
            lines = [
                read.apply_chat_template(_say(line), add_generation_prompt=True) for line in lines
            ]
        return [read(text=line, return_tensors="pt", **how)["input_ids"] for line in lines]
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise FewlinesError(f"{model_path} has no tokenizer that can be read ({said})") from None


def _say(line: str) -> list[dict[str, Any]]:
    """A conversation that begins with a prompt."""
    return [{"role": "user", "content": [{"type": "text", "text": line}]}]


def draw_codes(model: Any, prompt: Tensor, images: int, geometry: Geometry, seed: int) -> Tensor:
    """Draw images by the model's own `generate` with its own cache; their codes `(n, N)`.

    Args:
        model: of transformers.
        prompt: ids `(1, T)`.
        images: how many.
        geometry: of the model.
        seed: of the noise.
    """
    ids = prompt.repeat(images, 1).to(model.device)
    mask, n = torch.ones_like(ids), geometry.n_tokens
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.config.model_type == "janus":
            codes: Tensor = model.generate(
                ids, attention_mask=mask, generation_mode="image", do_sample=True
            )
            return codes
        how: dict[str, Any] = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": True}
        if model.config.model_type == "emu3":
            how["prefix_allowed_tokens_fn"] = _allow_lines(model, ids.shape[1], geometry.width)
        drawn: Tensor = model.generate(ids, attention_mask=mask, **how)
    return drawn[:, ids.shape[1] :]


def _allow_lines(model: Any, prefix: int, width: int) -> Callable[[int, Tensor], list[int]]:
    """Emu3's own rule: codes, and after each line the token that ends it."""
    words = model.vocabulary_mapping

    def allow(_: int, so_far: Tensor) -> list[int]:
        ends = (len(so_far) - prefix) % width == width - 1
        return [words.eol_token_id] if ends else list(words.image_tokens)

    return allow


def list_branches(model: Any, prompt: Tensor) -> Tensor:
    """List the prompts that guidance runs for one: itself, and where the model blanks it, that."""
    if model.config.model_type != "janus":
        return prompt
    config = model.generation_config
    kept = (prompt == config.bos_token_id) | (prompt == config.generation_kwargs["boi_token_id"])
    return torch.cat([prompt, prompt.where(kept, torch.tensor(config.pad_token_id))])
