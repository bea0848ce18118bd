"""Numbers in documents: marked blocks that name a table, a filter and columns.

A block is a comment with YAML in it, what was made of it, and `<!-- end -->`:

    <!-- block
    table: cache  # cache.csv of the tracked folder; seeds/* are several, told apart by `run`
    where: "model == 'base' and budget == 'lines: 3'"
    columns: {cache: policy, ΔNLL: nll_delta | ±.4f, KV MB: kv_bytes / cost_batch / 1e6 | .2f}
    -->
    …
    <!-- end -->

A column is an expression over the table's columns and, behind a bar, a format of Python. `±` takes
half the interval `…_low`, `…_high` beside the column. With `group`, rows of equal keys become one:
mean (smallest … largest). With `across`, the values of that column become columns, filled by
`value`. `sort` is a column, or several. `join` adds what another table says of the same model,
policy and budget. Every table has two columns more: `name` of a row, and `delta`, ΔNLL against the
full cache of as many steps. `<!-- value table | where | column | format -->` is one number in a
sentence, the mean of its rows, or behind `min` or `max` in the format the smallest or largest.
`<!-- config: model -->` is a section of the configuration, `<!-- config: model of pixelcnn -->`
that of another family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic_core import PydanticUndefined

from fewlines.config.experiment import make_schema
from fewlines.config.reading import find_sections
from fewlines.errors import FewlinesError
from fewlines.report.tables import add_delta, is_base

BLOCK = re.compile(r"(<!-- block\n(.*?)-->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value (.*?) -->)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
KEYS = {"table", "where", "join", "sort", "columns", "group", "rows", "across", "value"}
CONFIG = re.compile(r"(<!-- config: ?([\w. -]*?) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)


def fill(text: str, reference: Path) -> str:
    """Fill all blocks of a document.

    Args:
        text: of the document.
        reference: folder of the tracked tables.

    Raises:
        FewlinesError: a block names a table or a column that does not exist.
    """

    def in_table(found: re.Match[str]) -> str:
        try:
            spec = yaml.safe_load(found[2])
        except yaml.YAMLError as error:
            raise FewlinesError(f"a block is no YAML: {error}") from None
        return f"{found[1]}\n{_make_table(spec, reference)}\n\n{found[3]}"

    def in_sentence(found: re.Match[str]) -> str:
        table, where, column, form = (part.strip() for part in found[2].split("|"))
        values = _read(table, where, reference).eval(column)
        over, _, form = form.rpartition(" ")
        value = values if np.isscalar(values) else getattr(values, over or "mean")()
        return f"{found[1]}{format(value, form)}{found[3]}"

    text = BLOCK.sub(in_table, text)
    text = VALUE.sub(in_sentence, text)
    return CONFIG.sub(lambda found: f"{found[1]}\n{_describe(found[2])}\n\n{found[3]}", text)


def _read(table: str, where: str | None, reference: Path) -> pd.DataFrame:
    paths = sorted(reference.glob(f"{table}.csv"))
    if not paths:
        raise FewlinesError(f"a block names the table '{table}'; {reference} has none")
    every = [pd.read_csv(path).assign(run=path.stem) for path in paths]
    rows = pd.concat(every, ignore_index=True)
    if "model" in rows and "nll_delta_low" in rows:
        rows = add_delta(rows)
        adapted = np.where(is_base(rows), "", ", " + rows["model"].str.partition(":")[0])
        adapted += np.where(rows["model"].str.endswith(":distilled"), ", distilled", "")
        rows["name"] = rows["policy"] + ", " + rows["budget"] + adapted
    try:
        found: pd.DataFrame = rows.query(where, engine="python") if where else rows
    except (
        AttributeError,  # what pandas raises of an expression that it does not know
        KeyError,
        NotImplementedError,
        SyntaxError,
        TypeError,
        ValueError,
        pd.errors.UndefinedVariableError,
    ) as error:
        raise FewlinesError(f"a block of '{table}' asks where {where}: {error}") from None
    if found.empty:
        raise FewlinesError(f"a block of '{table}' asks where {where}: no row is like that")
    return found


def _make_table(spec: dict[str, Any], reference: Path) -> str:
    unknown = spec.keys() - KEYS
    if unknown:
        raise FewlinesError(f"a block says {min(unknown)}; it may say {', '.join(sorted(KEYS))}")
    rows = _read(spec["table"], spec.get("where"), reference)
    if "join" in spec:
        other, keys = _read(spec["join"], None, reference), ["model", "policy", "budget"]
        added = [*keys, *other.columns.difference(rows.columns)]
        rows = rows.merge(other[added], on=keys, how="left")
    if "sort" in spec:
        rows = rows.sort_values(spec["sort"], kind="stable")
    if "across" in spec:
        shown = _pivot(rows, spec)
    elif "group" in spec:
        groups = rows.groupby(spec["group"], sort=False)
        made = [_format(group, spec["columns"], spread=True) for _, group in groups]
        shown = pd.concat(made, ignore_index=True)
    else:
        shown = _format(rows, spec["columns"])
    return shown.to_markdown(index=False, disable_numparse=True)


def _format(rows: pd.DataFrame, columns: dict[str, str], spread: bool = False) -> pd.DataFrame:
    """Columns as text; with `spread`, one row for all: mean (smallest … largest)."""
    made = {}
    for title, spec in columns.items():
        expression, _, form = (part.strip() for part in spec.partition("|"))
        try:
            values: Any = rows.eval(expression)
        except pd.errors.UndefinedVariableError as error:
            raise FewlinesError(f"a block shows {expression}: {error}") from None
        if not form:
            made[title] = values.astype(str).tolist()[: 1 if spread else None]
        elif spread:
            mean, least, most = (format(x, form) for x in (values.mean(), min(values), max(values)))
            made[title] = [mean if least == most else f"{mean} ({least} … {most})"]
        elif form.startswith("±"):
            half = (rows[f"{expression}_high"] - rows[f"{expression}_low"]) / 2
            made[title] = [
                "" if pd.isna(value) else f"{value:+{form[1:]}} ± {reach:{form[1:]}}"
                for value, reach in zip(values, half, strict=True)
            ]
        else:
            made[title] = ["" if pd.isna(value) else format(value, form) for value in values]
    return pd.DataFrame(made)


def _pivot(rows: pd.DataFrame, spec: dict[str, Any]) -> pd.DataFrame:
    """A row for each of `rows`, best first or as they are sorted; a column for each value of
    `across`, largest last."""
    if rows.duplicated([spec["rows"], spec["across"]]).any():
        raise FewlinesError(
            f"a block of '{spec['table']}' has several rows of the same {spec['rows']} and "
            f"{spec['across']}; write a narrower where, or group"
        )
    column = spec["value"].partition("|")[0].strip()
    text = _format(rows, {"text": spec["value"]})["text"].to_numpy()
    wide = rows.assign(text=text).pivot(index=spec["rows"], columns=spec["across"], values="text")
    values = rows.pivot(index=spec["rows"], columns=spec["across"], values=column)
    order = values.rank().mean(axis=1).sort_values(kind="stable").index.tolist()
    if "sort" in spec:
        order = list(dict.fromkeys(rows[spec["rows"]]))
    columns = rows.drop_duplicates(spec["across"])
    if "capacity" in rows:
        columns = columns.sort_values("capacity")
    sized = columns[spec["across"]]
    shown: pd.DataFrame = wide.loc[order, sized].fillna("").reset_index()
    return shown


def _describe(section: str) -> str:
    """The keys of a section of the configuration: values, defaults and what they mean."""
    name, _, family = section.partition(" of ")
    schema: Any = make_schema(family or "llamagen")
    for part in filter(None, name.split(".")):
        schema = next(find_sections(schema.model_fields[part].annotation))
    rows = []
    for key, field in schema.model_fields.items():
        inside = any(find_sections(field.annotation))
        plain = field.default is not PydanticUndefined and not inside
        default = yaml.safe_dump(field.default, default_flow_style=True) if plain else ""
        shown = (
            default.removesuffix("\n").removesuffix("...").strip().replace("!!python/tuple ", "")
        )
        rows.append(
            {
                "key": f"`{key}`",
                "default": f"`{shown}`" if shown else "a section" if inside else "",
                "meaning": field.description or next(iter(_about(field.annotation)), ""),
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False)


def _about(annotation: Any) -> list[str]:
    return [(each.__doc__ or "").split(". ")[0] for each in find_sections(annotation)]
