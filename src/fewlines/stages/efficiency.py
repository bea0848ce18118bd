"""What decoding costs at published shapes: measured, tabulated, and planned for other devices."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from fewlines.config import Experiment
from fewlines.errors import FewlinesError
from fewlines.files import write_json, write_text
from fewlines.measure.choices import measure_choices as measure
from fewlines.measure.efficiency import measure_setting, settings_of
from fewlines.measure.policy_times import policy_times
from fewlines.measure.training_cost import training_cost
from fewlines.report.efficiency import draw_efficiency, efficiency_table, scaling_table
from fewlines.report.readable import write_table
from fewlines.report.results import Results


def measure_efficiency(config: Experiment, setting: str, output: Path) -> None:
    """Time and memory of all rows of one setting, interleaved."""
    settings = settings_of(config.efficiency, torch.get_num_threads())
    if setting not in settings:
        raise FewlinesError(f"no setting '{setting}' in this experiment; it has {list(settings)}")
    write_json(output, measure_setting(settings[setting], config.efficiency.repeats))


def measure_choices(output: Path) -> None:
    """Time the candidates for attention and linear layers that the engine chose from."""
    table = pd.DataFrame(measure())
    write_text(output, table.to_csv(index=False, float_format="%.6g"))


def measure_policy_times(config: Experiment, output: Path) -> None:
    """Time each bounded cache of the efficiency settings beside the first of them."""
    settings = settings_of(config.efficiency, torch.get_num_threads()).values()
    rows = [row for each in settings for row in policy_times(each, config.efficiency.repeats)]
    write_text(output, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))


def measure_training_cost(config: Experiment, output: Path) -> None:
    """Time a step of training with each cache in the loop, beside full attention."""
    table = pd.DataFrame(training_cost(config.model, config.training_cost))
    write_text(output, table.to_csv(index=False, float_format="%.6g"))


def efficiency(config: Experiment, run: Path) -> None:
    """Write the table and the figures of all settings of a run's folder."""
    table = efficiency_table(Results(config, run).efficiency)
    write_table(table, run / "tables", "efficiency")
    write_table(scaling_table(table), run / "tables", "scaling")
    draw_efficiency(table, run / "figures/efficiency.png")


def bench(config: Experiment, run: Path) -> None:
    """Measure every setting that is not measured yet, then write table and figures: what
    Snakemake's rule of that name does, by hand."""
    for name in settings_of(config.efficiency, torch.get_num_threads()):
        output = run / f"efficiency/{name}.json"
        if not output.exists():
            measure_efficiency(config, name, output)
    efficiency(config, run)
