"""Quality of the images drawn under each cache, the reference scores beside it, and whether the
images were drawn or remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewlines import machine
from fewlines.config import BASE, Experiment
from fewlines.data import ImageData
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors
from fewlines.metrics.features import load_features
from fewlines.metrics.neighbours import find_neighbours
from fewlines.metrics.quality import Images, count_numbers
from fewlines.metrics.quality import measure_quality as measure
from fewlines.models.checkpoint import load_network
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.neighbours import SHOWN, draw_neighbours, make_neighbour_table
from fewlines.report.provenance import write_measured
from fewlines.report.readable import write_table

COMPARED = 1000  # drawn images whose nearest training images are looked for; as many test images


def measure_quality(
    config: Experiment,
    samples: Path,
    images: Path,
    tokenizer: Path,
    output: Path,
    classifier: Path | None = None,
    row: str = BASE,
) -> None:
    """Measure FID, KID, IS, precision and recall of one cache's images, against all test images, or
    against as many training images where a task says so.

    Args:
        config: the experiment.
        samples: that `gather` wrote.
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        output: JSON to write.
        classifier: its weights, where `quality.features` says so.
        row: a task as tables name it, `base:completion`.
    """
    sets = _read_samples(config, samples, tokenizer)
    task, data = config.get_task(row), ImageData.load(images)
    against = task.against if task else "test"
    count = len(data.test.images)
    reference = data.test.images if against == "test" else data.train.images[-count:]
    facts = {"temperature": config.get_sampling(row).temperature, "against": against}
    _write(config, sets, reference, classifier, output, facts)


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
    network = load_network(tokenizer, Tokenizer).to(machine.device())
    data = ImageData.load(images)
    train_images, reference = data.train.images, data.test.images
    count, seeds = config.sampling.samples, len(config.sampling.seeds)
    if len(train_images) < count * seeds:
        raise FewlinesError(f"sampling: reference scores need {count * seeds} training images")
    sets = train_images[: count * seeds].split(count)
    _write(config, sets, reference, classifier, real)
    rebuild = [Made(lambda x: network.decode(network.encode(x)), part) for part in sets]
    _write(config, rebuild, reference, classifier, rebuilt)


def find_nearest(
    config: Experiment,
    samples: Path,
    images: Path,
    tokenizer: Path,
    run: Path,
    classifier: Path | None = None,
) -> None:
    """Find the training images that drawn ones, and test images, resemble most: a model that
    remembers draws what is nearer to a training image than test images are.

    Args:
        config: the experiment.
        samples: that `gather` wrote; of the first seed, a thousand images are compared.
        images: that `fetch-data` wrote.
        tokenizer: its weights.
        run: the folder of the run, for `tables/neighbours.csv` and `figures/neighbours.png`.
        classifier: its weights, where `quality.features` says so.
    """
    data = ImageData.load(images)
    made, train = _read_samples(config, samples, tokenizer)[0], data.train.images
    drawn = made[list(range(min(COMPARED, len(made))))]
    features = load_features(config.quality.features, classifier)
    both = torch.cat([drawn, data.test.images[: len(drawn)]])
    found = find_neighbours(both, train, features, config.quality.side)
    table = make_neighbour_table(
        found, ["drawn"] * len(drawn) + ["test"] * (len(both) - len(drawn))
    )
    write_table(table, run / "tables", "neighbours")
    nearest = {space: train[each.rows[:SHOWN]] for space, each in found.items()}
    distances = {space: each.distances[:SHOWN] for space, each in found.items()}
    draw_neighbours(drawn[:SHOWN], nearest, distances, run / "figures/neighbours.png")


def _read_samples(config: Experiment, samples: Path, tokenizer: Path) -> list[Made]:
    """The images of each seed, decoded as they are asked for."""
    network = load_network(tokenizer, Tokenizer).to(machine.device())
    tensors, header = read_tensors(samples)
    codes = [tensors[f"seed_{seed}"].unflatten(1, header["grid"]) for seed in config.sampling.seeds]
    return [Made(network.decode, each) for each in codes]


@dataclass(frozen=True)
class Made:
    """Images `(n, C, H, W)` that are made as they are asked for, by a function of rows of tensors
    `(n, …)`."""

    make: Callable[[Tensor], Tensor]
    of: Tensor

    def __len__(self) -> int:
        """Count the images."""
        return len(self.of)

    def __getitem__(self, rows: list[int]) -> Tensor:
        """Make images of some rows."""
        return self.make(self.of[rows])


def _write(
    config: Experiment,
    sets: Sequence[Images],
    reference: Images,
    classifier: Path | None,
    output: Path,
    facts: Mapping[str, Any] | None = None,
) -> None:
    machine.return_large_blocks()
    features = load_features(config.quality.features, classifier)
    results = measure(sets, reference, features, config.quality)
    measured = {
        "extractor": features.name,
        "samples": len(sets[0]),
        "reference_images": len(reference),
        "dimensions": count_numbers(features, reference),
        "statistics": str(config.quality.reference or ""),
    }
    write_measured(output, {**measured, **(facts or {}), "sets": results})
