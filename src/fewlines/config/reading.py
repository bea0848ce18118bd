"""Experiments from files and to files, and what is wrong with them in one sentence for each key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fewlines.config.experiment import Experiment, make_schema
from fewlines.errors import FewlinesError
from fewlines.schema import Section

FAMILY = "llamagen"  # of a model that names none

# Of the time before 2026-12: keys anywhere, and values of some keys.
RENAMED_KEYS = {
    "fold": "merge",
    "split": "allocation",
    "given": "prompt_lines",
    "carried": "transferred",
}
FREE = ("tasks", "architectures", "models", "options")  # what stands there is named by the user
RENAMED_VALUES = {"policy": {"linear": "line_ar"}, "allocation": {"summaries": "bands"}}
RENAMED_PARTS = {"+fold": "+merge", "+budgets": "+allocated", "+summaries": "+bands"}


def load_experiment(paths: Iterable[Path], also: Mapping[str, Any] | None = None) -> Experiment:
    """Load the experiment of YAML files, later ones overriding earlier ones key by key; where one
    names another family of models, what was said of the model before is not said of it.

    Args:
        paths: of the files.
        also: keys that override those of all files.

    Raises:
        FewlinesError: a file cannot be read, or what they say together is not usable.
    """
    merged: dict[str, Any] = {}
    for content in (*map(read_yaml, paths), also or {}):
        _update(merged, content)
    return validate_experiment(merged)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML's own loader forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict of a mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if key != "<<" and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"'{twice}' is written twice", node.start_mark
            )
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        FewlinesError: there is none, or it is no UTF-8, no YAML, no mapping, or has a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader) or {}
    except FileNotFoundError:
        raise FewlinesError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise FewlinesError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        where = f", line {mark.line + 1}" if mark else ""
        raise FewlinesError(f"{path}{where} is not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise FewlinesError(f"{path} must hold keys such as 'caches:', not {content!r}")
    return content


def _update(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        held = into.get(key)
        if not (isinstance(value, dict) and isinstance(held, dict)) or _names_another(value, held):
            into[key] = value
        else:
            into[key] = dict(held)
            _update(into[key], value)


def _names_another(model: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Whether a section names another family of models than the one before it."""
    return "family" in model and model["family"] != than.get("family", FAMILY)


def validate_experiment(content: Mapping[str, Any]) -> Experiment:
    """Validate what a configuration says.

    Args:
        content: of all its files.

    Raises:
        FewlinesError: names each wrong key and what is allowed there, and each old name with the
            new one.
    """
    old = [f"{where}: {sentence}" for where, sentence in _find_old_names(content)]
    if old:
        raise FewlinesError(_join(old))
    model = content.get("model")
    family = model.get("family", FAMILY) if isinstance(model, Mapping) else FAMILY
    schema = make_schema(str(family))
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise FewlinesError(_join(_explain(error, schema))) from None


def _join(complaints: Sequence[str] | Iterator[str]) -> str:
    lines = "\n".join(f"  {line}" for line in complaints)
    return f"the configuration is not usable:\n{lines}"


def _find_old_names(content: object, where: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """Names that are others now, wherever they stand."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            inside = f"{where}.{name}".removeprefix(".")
            if name in RENAMED_KEYS and key not in FREE:
                yield inside, f"'{name}' is called '{RENAMED_KEYS[name]}' now"
            yield from _find_old_names(value, inside, str(name))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _find_old_names(value, f"{where}.{number}", key)
    elif isinstance(content, str):
        new = RENAMED_VALUES.get(key, {}).get(content, content)
        if key in ("caches", "compared", "cache"):
            new = "line_ar" + new[6:] if new.startswith(("linear-", "linear+")) else new
            for old, other in RENAMED_PARTS.items():
                new = new.replace(old, other)
        if new != content:
            yield where, f"'{content}' is called '{new}' now"


def _explain(error: ValidationError, schema: type[Experiment]) -> Iterator[str]:
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
            known = _list_keys(schema, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            message = f"unknown key; {hint}"
        elif "input" in problem and not isinstance(problem["input"], Mapping | Section):
            message = f"{message} (found {problem['input']!r})"
        yield f"{where}: {message}" if where else message


def _list_keys(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys of the section at a location: a key's own, or that of each of its items."""
    for part in location:
        if part in schema.model_fields:
            schema = next(find_sections(schema.model_fields[str(part)].annotation), schema)
    return list(schema.model_fields)


def find_sections(annotation: Any) -> Iterator[type[Section]]:
    """Find the sections that an annotation holds, itself or inside."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inside in get_args(annotation):
        yield from find_sections(inside)


def dump_experiment(experiment: Experiment) -> str:
    """Write the experiment as YAML, every default too; it reads back as the same experiment."""
    content = experiment.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
