"""The schedule's calibration: a minute, once per model."""

from __future__ import annotations

from pathlib import Path

from fewlines.config import Experiment
from fewlines.measure.attention import expected_attention
from fewlines.models.checkpoint import load_network
from fewlines.models.transformer import Transformer
from fewlines.progress import progress
from fewlines.stages.tokens import read_tokens


def calibrate(config: Experiment, model: Path, tokens: Path, output: Path) -> None:
    """Measure where each head looks, on the first training images."""
    network = load_network(model, Transformer)
    tensors, _ = read_tokens(tokens)
    count = config.calibration.images
    labels, codes = tensors["train_labels"][:count], tensors["train_codes"][:count]
    bar = progress("calibrate", len(labels), "images")
    found = expected_attention(network, labels, codes, config.calibration.batch, bar.update)
    bar.close()
    found.save(output)
