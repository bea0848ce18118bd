"""Experiments from files and to files, and what is wrong with them in one sentence for each key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fewlines.config.experiment import Experiment
from fewlines.config.settings import CacheSettings, EfficiencyRun, Section
from fewlines.errors import FewlinesError


def load_experiment(paths: Sequence[Path]) -> Experiment:
    """The experiment of these YAML files, later ones overriding earlier ones key by key."""
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise FewlinesError(f"{path} does not exist") from None
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
            where = f", line {mark.line + 1}" if mark else ""
            raise FewlinesError(f"{path}{where} is not valid YAML: {problem}") from None
        if not isinstance(content, dict):
            raise FewlinesError(f"{path} must hold keys such as 'caches:', not {content!r}")
        _merge(merged, content)
    return validate_experiment(merged)


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def validate_experiment(content: dict[str, Any]) -> Experiment:
    """Raises one `FewlinesError` that names each wrong key and what is allowed there."""
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        complaints = "\n".join(f"  {line}" for line in _complaints(error))
        raise FewlinesError(f"the configuration is not usable:\n{complaints}") from None


def _complaints(error: ValidationError) -> Iterator[str]:
    problems = error.errors()
    for problem in problems:
        inside = [
            other for other in problems if other["loc"][: len(problem["loc"])] == problem["loc"]
        ]
        if problem["type"] == "too_short" and len(inside) > 1:
            continue  # empty because of them
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _section_at(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            message = f"unknown key; {hint}"
        elif "input" in problem and not isinstance(problem["input"], dict | Section):
            message = f"{message} (found {problem['input']!r})"
        yield f"{where}: {message}" if where else message


def _section_at(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Experiment
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        if part in ("caches", "runs"):
            annotation = {"caches": CacheSettings, "runs": EfficiencyRun}[part]
        assert isinstance(annotation, type)
        section = annotation
    return list(section.model_fields)


def dump_experiment(experiment: Experiment) -> str:
    """The experiment as YAML, every default written out; reads back as the same experiment."""
    content = experiment.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
