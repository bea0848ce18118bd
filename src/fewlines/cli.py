"""`fewlines <stage> --option value`: every stage of `stages.py`, its parameters as options."""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fewlines import machine, stages
from fewlines.config import Experiment, load_experiment
from fewlines.errors import FewlinesError

STAGES: tuple[Callable[..., None], ...] = (
    stages.fetch_data,
    stages.train_tokenizer,
    stages.train_classifier,
    stages.tokenize,
    stages.train_model,
    stages.generate,
    stages.gather,
    stages.measure_quality,
    stages.measure_floors,
    stages.measure_likelihood,
    stages.measure_cost,
    stages.measure_paper,
    stages.tables,
    stages.figures,
    stages.report,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    stage: Callable[..., None] = options.pop("stage")
    torch.set_num_threads(options.pop("threads"))
    try:
        if "config" in options:
            options["config"] = load_experiment(options["config"])
        stage(**options)
    except FewlinesError as error:
        print(f"fewlines: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fewlines", description="Image generation with few lines.")
    commands = parser.add_subparsers(required=True, metavar="stage")
    for stage in STAGES:
        summary = (inspect.getdoc(stage) or "").split("\n\n")[0].replace("\n", " ")
        command = commands.add_parser(
            stage.__name__.replace("_", "-"), help=summary, description=summary
        )
        command.set_defaults(stage=stage)
        command.add_argument(
            "--threads", type=int, default=machine.cores(), help="threads of torch, all cores"
        )
        for name, kind in typing.get_type_hints(stage).items():
            if name != "return":
                _add_option(command, name, kind)
    return parser


def _add_option(command: argparse.ArgumentParser, name: str, kind: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    if kind is Experiment:
        text = "YAML file of the experiment; may be given again, later files override"
        command.add_argument(option, type=Path, action="append", required=True, help=text)
    elif typing.get_origin(kind) is list:
        command.add_argument(option, type=typing.get_args(kind)[0], nargs="+", required=True)
    else:
        command.add_argument(option, type=kind, required=True, metavar=kind.__name__.upper())


if __name__ == "__main__":
    sys.exit(main())
