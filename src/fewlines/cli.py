"""`fewlines <stage> --option value`: every stage as a command, its parameters as options."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import torch
import typer

from fewlines import machine
from fewlines.config import Experiment, load_experiment
from fewlines.errors import FewlinesError
from fewlines.stages import MODULES, READS, load_stage
from fewlines.stages.tokens import check_data

CONFIG = "YAML file of the experiment; may be given again, later files override"
THREADS = "threads of torch; all cores if not given"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage.

    Args:
        arguments: of the command line; those of this process where None.

    Returns:
        0, or 2 after a sentence on what was wrong.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = typer.Typer(
        name="fewlines",
        help="The stages of an experiment; snakemake runs them all in order.",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_do_nothing)  # or an app of one command would have no name for it
    # A process imports no more than its own stage needs.
    for name in given[:1] if given[:1] and given[0] in MODULES else MODULES:
        stage = load_stage(name)
        summary = (inspect.getdoc(stage) or "").split("\n\nArgs:")[0].replace("\n", " ")
        app.command(name, help=summary)(_make_command(name, stage))
    try:
        app(given, prog_name="fewlines")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _do_nothing() -> None:
    """Options that all stages have: none."""


def _make_command(name: str, stage: Callable[..., None]) -> Callable[..., None]:
    """What typer makes a command of: the stage's parameters, each an option with the help text that
    its docstring has, and `--threads`."""
    hints = get_type_hints(stage, include_extras=True)
    texts = dict(re.findall(r"^ +(\w+): ((?:.|\n +)+?)$(?=\n|\Z)", stage.__doc__ or "", re.M))
    parameters = [
        inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=machine.cores())
    ]
    kinds: dict[str, Any] = {"threads": Annotated[int, typer.Option(min=1, help=THREADS)]}
    for option, parameter in inspect.signature(stage).parameters.items():
        if hints[option] in (Experiment, Experiment | None):
            needed = hints[option] is Experiment
            kinds[option] = Annotated[
                list[Path] if needed else list[Path] | None,
                typer.Option(help=CONFIG, envvar="FEWLINES_CONFIG"),
            ]
            parameter = parameter if needed else parameter.replace(default=None)
        elif get_origin(hints[option]) is Annotated:
            kinds[option] = hints[option]
        else:
            text = re.sub(r"\s+", " ", texts.get(option, ""))
            kinds[option] = Annotated[hints[option], typer.Option(help=text)]
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def command(threads: int, **options: Any) -> None:
        torch.set_num_threads(threads)
        try:
            if options.get("config"):
                experiment = load_experiment(options["config"])
                given = (options.get("images"), options.get("tokens"))
                for data in (each for each in given if isinstance(each, Path)):
                    check_data(experiment, data)
                options["config"] = experiment.restrict(READS[name])
            stage(**options)
        except FewlinesError as error:
            print(f"fewlines: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"fewlines: {where}{error.strerror or error}", file=sys.stderr)
            raise typer.Exit(2) from None

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=kinds[parameter.name]) for parameter in parameters]
    )
    command.__annotations__ = kinds
    return command


if __name__ == "__main__":
    sys.exit(main())
