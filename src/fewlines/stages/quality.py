"""Quality of the images drawn under each cache, and the reference scores beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fewlines.config import Experiment
from fewlines.data import ImageData
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_json
from fewlines.metrics.features import load_features
from fewlines.metrics.quality import measure_quality as measure
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer


def measure_quality(
    config: Experiment,
    samples: Path,
    images: Path,
    tokenizer: Path,
    output: Path,
    classifier: Path | None = None,
) -> None:
    """Measure FID, KID, IS, precision and recall of one cache's images, against all test images.

    Args:
        config: the experiment.
        samples: that `gather` wrote.
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        output: JSON to write.
        classifier: its weights, where `quality.features` says so.
    """
    network = load_network(tokenizer, Tokenizer)
    tensors, header = read_tensors(samples)
    sets = [
        network.decode(tensors[f"seed_{seed}"].unflatten(1, header["grid"]))
        for seed in config.sampling.seeds
    ]
    _write(config, sets, images, classifier, output)


def measure_reference(
    config: Experiment,
    images: Path,
    tokenizer: Path,
    real: Path,
    rebuilt: Path,
    classifier: Path | None = None,
) -> None:
    """Measure what a perfect model would reach: training images, and their reconstructions, as many
    of them as there are samples, against all test images.

    Args:
        config: the experiment.
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        real: JSON to write, of the training images.
        rebuilt: JSON to write, of their reconstructions.
        classifier: its weights, where `quality.features` says so.
    """
    network = load_network(tokenizer, Tokenizer)
    train_images = ImageData.load(images).train.images
    count, seeds = config.sampling.samples, len(config.sampling.seeds)
    if len(train_images) < count * seeds:
        raise FewlinesError(f"sampling: reference scores need {count * seeds} training images")
    sets = train_images[: count * seeds].split(count)
    _write(config, sets, images, classifier, real)
    reconstructions = [network.decode(network.encode(part)) for part in sets]
    _write(config, reconstructions, images, classifier, rebuilt)


def _write(
    config: Experiment, sets: Sequence[Tensor], images: Path, classifier: Path | None, output: Path
) -> None:
    features = load_features(config.quality.features, classifier)
    reference = ImageData.load(images).test.images
    results = measure(sets, reference, features, config.quality)
    facts = {
        "extractor": features.name,
        "samples": len(sets[0]),
        "reference_images": len(reference),
        "dimensions": features.network(reference[:1])[0].shape[1],
    }
    write_json(output, {**facts, "sets": results})
