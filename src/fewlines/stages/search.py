"""Every policy at its best, chosen on training images, so that test images choose nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fewlines import machine
from fewlines.config import Experiment
from fewlines.errors import look_up
from fewlines.files import read_json
from fewlines.metrics.likelihood import measure_likelihoods
from fewlines.metrics.search import search_options as search
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.report.baselines import make_baseline_table
from fewlines.report.provenance import write_measured
from fewlines.report.readable import write_table
from fewlines.stages.tokens import read_tokens


def search_options(
    config: Experiment,
    model: Path,
    tokens: Path,
    cache: str,
    output: Path,
    calibration: Path | None = None,
) -> None:
    """Search the options of one policy at one budget, on the training images that follow the
    calibration's.

    Args:
        config: the experiment.
        model: weights.
        tokens: that `tokenize` wrote.
        cache: its name in `search`.
        output: JSON to write.
        calibration: of the model, for caches that go by one.
    """
    network = load_network(model, AttentionModel).to(machine.device())
    tensors, _ = read_tokens(tokens, network.spec)
    first = config.calibration.images + config.calibration.curve_images
    held = slice(first, first + config.search.images)
    labels, codes = tensors["train_labels"][held], tensors["train_codes"][held]
    start, options = look_up(cache, config.search.caches, "search")
    start = start.calibrated(calibration)  # read once; every configuration goes by it
    bar = progress(f"search {cache}", config.search.trials * len(labels), "images")
    measure = partial(
        measure_likelihoods, network, labels, codes, batch=config.calibration.batch, done=bar.update
    )
    found = search(start, options, config.search.trials, measure)
    bar.close()
    trials = [
        {
            "policy": trial.cache.policy_text,
            "budget": trial.cache.budget_text,
            "capacity": network.count_entries(trial.cache),
            "smallest": int(trial.cache.plan(network.geometry).capacity.min()),
            **trial.found.summarise(),
        }
        for trial in found
    ]
    write_measured(output, {"searched": start.policy_text, "trials": trials})


def baselines(config: Experiment, run: Path) -> None:
    """Write the table of the searches: every configuration that was tried, the best first.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    searches = [read_json(run / f"search/{slug}.json") for slug in config.search.caches]
    write_table(make_baseline_table(searches), run / "tables", "baselines")
