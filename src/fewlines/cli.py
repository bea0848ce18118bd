"""`fewlines <stage> --option value`: every stage, its parameters as options."""

from __future__ import annotations

import argparse
import inspect
import sys
import types
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
    """Run a stage; returns 0, or 2 after a sentence on what was wrong."""
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
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fewlines: {where}{error.strerror or error}; nothing was written", file=sys.stderr)
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
            "--threads", type=_positive, default=machine.cores(), help="threads of torch; all cores"
        )
        for option, kind in typing.get_type_hints(stage).items():
            if option != "return":
                given = inspect.signature(stage).parameters[option].default
                _add_option(command, option, kind, given)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return number


def _add_option(command: argparse.ArgumentParser, name: str, kind: Any, default: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    required = default is inspect.Parameter.empty
    if typing.get_origin(kind) is types.UnionType or type(None) in typing.get_args(kind):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if kind is Experiment:
        text = "YAML file of the experiment; may be given again, later files override"
        command.add_argument(option, type=Path, action="append", required=True, help=text)
    elif kind is bool:
        command.add_argument(option, action="store_true")
    elif typing.get_origin(kind) is list:
        of = typing.get_args(kind)[0]
        command.add_argument(option, type=of, nargs="+", required=required, default=None)
    else:
        allowed = typing.get_args(kind)  # of a Literal
        given: dict[str, Any] = {"required": True} if required else {"default": default}
        given |= {"choices": allowed} if allowed else {"metavar": kind.__name__.upper()}
        command.add_argument(option, type=str if allowed else kind, **given)


if __name__ == "__main__":
    sys.exit(main())
