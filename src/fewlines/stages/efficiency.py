"""What decoding costs at published shapes: measured, and tabulated."""

from __future__ import annotations

from pathlib import Path

import torch

from fewlines.bench.efficiency import make_settings, measure_setting
from fewlines.bench.policy_times import measure_policies
from fewlines.config import Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_csv, write_json
from fewlines.report.efficiency import draw_efficiency, make_efficiency_table, make_scaling_table
from fewlines.report.provenance import make_stamp_here
from fewlines.report.readable import write_table
from fewlines.report.results import Results


def measure_efficiency(config: Experiment, setting: str, output: Path) -> None:
    """Measure time and memory of all rows of one setting, interleaved. What is done lies in a file
    beside the output meanwhile, from which a measurement that was killed goes on.

    Args:
        config: the experiment.
        setting: its name, which Snakemake's files have.
        output: JSON to write.
    """
    settings = make_settings(config.efficiency, torch.get_num_threads())
    if setting not in settings:
        raise FewlinesError(f"no setting '{setting}' in this experiment; it has {list(settings)}")
    part, repeats = output.with_suffix(".part"), config.efficiency.repeats
    write_json(output, measure_setting(settings[setting], repeats, make_stamp_here(), part))
    part.unlink(missing_ok=True)


def measure_policy_times(config: Experiment, output: Path) -> None:
    """Time each bounded cache of the efficiency settings beside the first of them.

    Args:
        config: the experiment.
        output: CSV to write.
    """
    settings = make_settings(config.efficiency, torch.get_num_threads()).values()
    rounds = config.efficiency.repeats
    stamp = make_stamp_here()
    rows = [row | stamp for each in settings for row in measure_policies(each, rounds)]
    write_csv(output, rows)


def efficiency(config: Experiment, run: Path) -> None:
    """Write the tables and the figure of all settings of a run.

    Args:
        config: the experiment.
        run: its folder in results.
    """
    table = make_efficiency_table(Results(config, run).efficiency)
    write_table(table, run / "tables", "efficiency")
    write_table(make_scaling_table(table), run / "tables", "scaling")
    draw_efficiency(table, run / "figures/efficiency.png")
