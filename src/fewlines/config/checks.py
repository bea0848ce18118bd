"""What the settings of an experiment ask of its data, checked as soon as the data is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fewlines.config.experiment import Experiment
from fewlines.errors import FewlinesError


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set.

    Attributes:
        train: images of the training set.
        test: images of the test set.
        side: `(H, W)` of an image in pixels; None where the data is tokens.
        grid: `(h, w)` of an image in tokens.
    """

    train: int
    test: int
    side: tuple[int, int] | None
    grid: tuple[int, int]


def check_against_data(experiment: Experiment, facts: DataFacts) -> None:
    """Check all settings against the data, before anything is trained on it.

    Raises:
        FewlinesError: names each key that the data cannot satisfy, and the value that would do.
    """
    complaints = [f"\n  {each}" for each in _find_complaints(experiment, facts)]
    if complaints:
        raise FewlinesError(f"the data is not enough for these settings:{''.join(complaints)}")


def _find_complaints(experiment: Experiment, facts: DataFacts) -> Iterator[str]:
    quality, calibration = experiment.quality, experiment.calibration
    wanted, found = experiment.data.images, facts.train + facts.test
    if wanted is not None and wanted != found:
        yield f"data.images: {wanted} must be there, and there are {found}; is the copy whole?"
    if facts.test < 2:
        yield f"data: {facts.test} test images; at least 2 are needed"
    if facts.side is not None:
        tokenizer, (height, width) = experiment.tokenizer, facts.side
        stride = tokenizer.stride
        if tokenizer.trained and any(side % stride for side in facts.side):
            yield (
                f"tokenizer.widths: {len(tokenizer.widths)} levels make tokens of {stride}×{stride}"
                f" pixels, which do not divide images of {height}×{width}"
            )
        if tokenizer.two_levels and any(tokens % 2 for tokens in facts.grid):
            yield (
                f"tokenizer.two_levels: images of {height}×{width} have "
                f"{facts.grid[0]}×{facts.grid[1]} tokens; both sides must be even"
            )
        if quality.kid_subset_size > facts.test:
            yield (
                f"quality.kid_subset_size: {quality.kid_subset_size} of {facts.test} test images; "
                f"write {facts.test} or less"
            )
        fewest = min(facts.test, experiment.sampling.samples)
        if quality.neighbours >= fewest:
            yield (
                f"quality.neighbours: {quality.neighbours} of {facts.test} test images and "
                f"{experiment.sampling.samples} samples; write {fewest - 1} or less"
            )
        needed = experiment.sampling.samples * len(experiment.sampling.seeds)
        if needed > facts.train:
            yield (
                f"sampling.samples: reference scores need as many training images, {needed} for "
                f"{len(experiment.sampling.seeds)} seeds; there are {facts.train}"
            )
    needed = calibration.images + calibration.curve_images
    if any(cache.requires for cache in experiment.cache_by_slug.values()) and needed > facts.train:
        yield (
            f"calibration.images: {calibration.images} and {calibration.curve_images} of "
            f"curve_images are more than the {facts.train} training images"
        )
    searched = needed + experiment.search.images
    if experiment.search.caches and searched > facts.train:
        yield (
            f"search.images: {experiment.search.images} after the {needed} of calibration are more "
            f"than the {facts.train} training images"
        )
    for name, task in experiment.tasks.items():
        if task.prompt_lines >= facts.grid[0]:
            yield (
                f"tasks.{name}.prompt_lines: {task.prompt_lines} of an image of {facts.grid[0]} "
                f"lines; write {facts.grid[0] - 1} or less"
            )
    for slug, cache in experiment.cache_by_slug.items():
        try:
            if cache.budget and cache.budget.tokens(facts.grid) <= cache.merge:
                yield f"caches: {slug} has no token beside its merge slot; write a larger budget"
        except FewlinesError as error:
            yield f"caches: {slug}: {error}"
