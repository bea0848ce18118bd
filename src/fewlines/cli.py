"""`fewlines <stage> --option value`: every stage, its parameters as options."""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fewlines import machine
from fewlines.config import Experiment, load_experiment
from fewlines.errors import FewlinesError
from fewlines.stages import MODULES, load_stage


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(_parser(given[:1]).parse_args(given))
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


def _parser(wanted: Sequence[str]) -> argparse.ArgumentParser:
    """Options of the stage that is wanted; all of them where none is, to show the help."""
    parser = argparse.ArgumentParser(
        "fewlines", description="The stages of an experiment; snakemake runs them all in order."
    )
    commands = parser.add_subparsers(required=True, metavar="stage")
    for name in MODULES if not set(wanted) <= set(MODULES) or not wanted else wanted:
        stage = load_stage(name)
        summary = (inspect.getdoc(stage) or "").replace("\n", " ")
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(stage=stage)
        command.add_argument(
            "--threads", type=int, default=machine.cores(), help="threads of torch; all cores"
        )
        for option, kind in typing.get_type_hints(stage).items():
            if option != "return":
                given = inspect.signature(stage).parameters[option]
                _add_option(command, option, kind, given.default is inspect.Parameter.empty)
    return parser


def _add_option(command: argparse.ArgumentParser, name: str, kind: Any, required: bool) -> None:
    option = f"--{name.replace('_', '-')}"
    if kind is Experiment:
        text = "YAML file of the experiment; may be given again, later files override"
        command.add_argument(option, type=Path, action="append", required=True, help=text)
    elif typing.get_origin(kind) is list:
        command.add_argument(option, type=typing.get_args(kind)[0], nargs="+", required=True)
    else:
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
        command.add_argument(option, type=kind, required=required, metavar=kind.__name__.upper())


if __name__ == "__main__":
    sys.exit(main())
