"""The experiment's keys as a page, written from the schema: docs/config.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from fewlines.config import Experiment

LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
NAMES = {"integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
NAMES |= {"string": "text", "object": "keys and values"}
Schema = dict[str, Any]


def describe_config() -> str:
    """A table of the experiment's own keys and one for each of its sections, in Markdown."""
    schema = Experiment.model_json_schema()
    of_its_own = {_section_in(value): key for key, value in schema["properties"].items()}
    return "\n\n".join(_section("", schema, schema["$defs"], of_its_own))


def _section(
    where: str, schema: Schema, sections: dict[str, Schema], of_its_own: dict[str, str]
) -> Iterator[str]:
    """The section at the key `where` and those inside it, but for those that the experiment's own
    keys hold too: `of_its_own`, by the section's name."""
    rows, inside = [], {}
    for key, value in schema["properties"].items():
        name = _section_in(value)
        elsewhere = of_its_own.get(name) if where and name else None
        if name and not elsewhere:
            inside[f"{where}.{key}".removeprefix(".")] = sections[name]
        rows.append(
            {
                "key": f"`{key}`",
                "values": f"as [`{elsewhere}`](#{elsewhere})" if elsewhere else _values(value),
                "default": _default(value) if not name else "",
                "": value.get("description", ""),
            }
        )
    title = f"## `{where}`" if where else "## The experiment"
    about = schema.get("description", "") if where else ""
    yield "\n\n".join(filter(None, [title, about, pd.DataFrame(rows).to_markdown(index=False)]))
    for path, section in inside.items():
        yield from _section(path, section, sections, of_its_own)


def _section_in(value: Schema) -> str:
    """The name of the section that a key holds, or holds several of."""
    holds = (value, value.get("items", {}), _by_name(value))
    references = (one["$ref"] for one in holds if "$ref" in one)
    return next(references, "").removeprefix("#/$defs/")


def _by_name(value: Schema) -> Schema:
    """What stands under every name, of a key whose names are the user's."""
    found: Schema = next(iter(value.get("patternProperties", {}).values()), {})
    return found


def _values(value: Schema) -> str:
    if _section_in(value):
        each = "each a section" if value.get("type") == "array" else "a section for each name"
        return "a section, below" if "$ref" in value else f"{each}, below"
    if "anyOf" in value:
        return ", or ".join(_values(one) for one in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        return f"list of {_values(value['items'])}"
    limits = [f"{sign} {value[name]:g}" for name, sign in LIMITS.items() if name in value]
    return " ".join([NAMES.get(value.get("type", ""), ""), *limits])


def _default(value: Schema) -> str:
    return f"`{json.dumps(value['default'])}`" if "default" in value else ""
