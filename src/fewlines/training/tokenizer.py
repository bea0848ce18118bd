"""Training of the VQ tokenizer: reconstruction, commitment, and the revival of dead codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlines import machine
from fewlines.config.tokenizer import TokenizerSettings
from fewlines.files import digest
from fewlines.models.tokenizer import ConvTokenizer, Quantized, Tokenizer, to_signed
from fewlines.training.loop import WHOLE, Objective, draw_rows, make_generator
from fewlines.training.parallel import Share, gather

REVIVE_EVERY = 20  # steps
REVIVE_BELOW = 0.03  # of the mean count of a code
REVIVE_UNTIL = 0.8  # of the training: the last codes need time to settle


class TokenizerObjective(Objective):
    """Mean squared error of `images` `(n, C, H, W)` uint8 on [−1, 1]."""

    def __init__(self, settings: TokenizerSettings, images: Tensor, seed: int) -> None:
        self.settings, self.images, self.seed = settings, images, seed
        self.steps, self.batch, self.warmup = settings.steps, settings.batch, 20
        self.quantized: list[Quantized] = []  # of the shares of a step
        with torch.random.fork_rng(devices=[]):  # convolutions initialise themselves globally
            torch.manual_seed(seed)
            network = settings.make(images.shape[1])
        assert isinstance(network, ConvTokenizer)
        self.network: ConvTokenizer = network
        self.network.to(memory_format=torch.channels_last).to(machine.device())
        self.optimizers = [
            torch.optim.AdamW(
                self.network.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=1e-4
            )
        ]
        every = torch.ones(settings.codes, dtype=torch.bool, device=self.network.device)
        self._revive(every, self._encoded(step=0), step=0)

    def fingerprint(self) -> list[Any]:
        """Settings, seed and data."""
        return [self.settings.model_dump(mode="json"), self.seed, digest([self.images])]

    def compute_loss(self, step: int, share: Share = WHOLE) -> Tensor:
        """Compute the loss of one step."""
        images, replace = self._draw_images(step, share), self._replacements(step)
        reconstructed, quantized = self.network(
            images, self.settings.commitment, None if replace is None else share.of(replace)
        )
        self.quantized.append(quantized)
        loss: Tensor = F.mse_loss(reconstructed, images) + quantized.loss
        return loss

    def after_step(self, step: int) -> None:
        """Revive codes that are hardly used."""
        indices, encoded = (
            gather(torch.cat([getattr(each, of) for each in self.quantized]))
            for of in ("indices", "encoded")
        )
        self.quantized.clear()
        counts = self.network.quantizer.counts
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
        if (step + 1) % REVIVE_EVERY == 0:
            if step < REVIVE_UNTIL * self.steps:
                self._revive(counts < REVIVE_BELOW * counts.mean(), encoded, step)
            counts.zero_()

    def _draw_images(self, step: int, share: Share = WHOLE) -> Tensor:
        rows = draw_rows(len(self.images), self.batch, step, self.seed)
        return to_signed(self.images[share.of(rows)].to(self.network.device))

    def _replacements(self, step: int) -> Tensor | None:
        """Random codes for a share of the positions, −1 elsewhere, `(B, h, w)`.

        A decoder that survives wrong codes leans on their neighbours, so that codes say less that
        is new, a model predicts them better, and its mistakes cost less (RobustTok 2503.08354).
        """
        share = self.settings.perturbation
        if not share:
            return None
        stride = self.network.shape.stride
        side = (self.images.shape[-2] // stride, self.images.shape[-1] // stride)
        shape = (self.settings.batch, *side)
        generator = make_generator(self.seed + 2, step)
        codes = torch.randint(self.settings.codes, shape, generator=generator)
        codes = codes.masked_fill(torch.rand(shape, generator=generator) >= share, -1)
        return codes.to(self.network.device)

    @torch.no_grad()
    def _encoded(self, step: int) -> Tensor:
        quantized = self.network.quantizer(self.network.compress(self._draw_images(step)), 1.0)
        assert isinstance(quantized, Quantized)
        return quantized.encoded

    @torch.no_grad()
    def _revive(self, dead: Tensor, encoded: Tensor, step: int) -> None:
        """Dead codes take the place of random encodings."""
        rows = torch.randint(
            len(encoded), (int(dead.sum()),), generator=make_generator(self.seed + 1, step)
        )
        self.network.quantizer.embedding.weight[dead] = encoded[rows.to(encoded.device)]


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, images: Tensor) -> dict[str, float]:
    """Mean squared error on [−1, 1] and the share of the codes that are used."""
    error, used = 0.0, torch.zeros(tokenizer.shape.codes, dtype=torch.bool)
    for part in images.split(tokenizer.batch):
        target = to_signed(part.to(tokenizer.device))
        indices = tokenizer.find_codes(target)
        error += F.mse_loss(tokenizer.draw_images(indices), target, reduction="sum").item()
        used[indices.flatten().cpu()] = True
    return {"mse": error / images.numel(), "codes_used": used.float().mean().item()}
