"""Every policy at its best, chosen on training images, so that test images choose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewlines import machine
from fewlines.cache.spec import Cache
from fewlines.config import Experiment
from fewlines.files import read_json, write_json
from fewlines.metrics.likelihood import Likelihood, measure_likelihoods, name_interval
from fewlines.metrics.search import search_options as search
from fewlines.models.base import AttentionModel
from fewlines.models.checkpoint import load_network
from fewlines.progress import progress
from fewlines.report.baselines import make_baseline_table
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
    start, options = config.search.caches[cache]
    bar = progress(f"search {cache}", config.search.trials * len(labels), "images")
    measure = partial(
        measure_likelihoods, network, labels, codes, batch=config.calibration.batch, done=bar.update
    )

    def measure_all(caches: Sequence[Cache]) -> list[Likelihood]:
        return measure([each.calibrated(calibration) for each in caches])

    found = search(start, options, config.search.trials, measure_all)
    bar.close()
    trials = []
    for trial in found:
        known = trial.cache.calibrated(calibration)
        facts = {
            "policy": known.policy_text,
            "budget": known.budget_text,
            "capacity": network.count_entries(known),
            "smallest": int(known.plan(network.geometry).capacity.min()),
            "nll": trial.nll,
            **name_interval("nll_delta", trial.found.nll - trial.found.nll_full),
            "kl": trial.found.kl.double().mean().item(),
            "kl_by_line": trial.found.average_by_line(trial.found.kl).tolist(),
            "nll_of_images": trial.found.nll.tolist(),
        }
        trials.append(facts)
    write_json(output, {"searched": start.policy_text, "trials": trials})


def baselines(config: Experiment, run: Path) -> None:
    """Write the table of the searches: every configuration that was tried, the best first.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    searches = [read_json(run / f"search/{slug}.json") for slug in config.search.caches]
    write_table(make_baseline_table(searches), run / "tables", "baselines")
