"""What values may be: types of a configuration's keys, and of the fields of what checks itself.

The same types say the same sentence wherever a value comes from: YAML, a command line, Python.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)

from fewlines.errors import FewlinesError

Precision = Literal["auto", "float32", "bfloat16"]
Storage = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Mass = Annotated[float, Field(gt=0, le=1)]
Levels = Annotated[int, Field(gt=1, le=256)]


def _be_odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("write an odd number")
    return value


Odd = Annotated[int, Field(gt=0), AfterValidator(_be_odd)]


class Section(BaseModel):
    """A part of the experiment. Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def check_fields(subject: Any, name: str) -> None:
    """Check the fields of a dataclass against their annotations, whatever constructed it.

    Args:
        subject: the object; its annotations may be `Annotated` with pydantic's ranges.
        name: of it, for the sentence.

    Raises:
        FewlinesError: names the first field that is not what its annotation says.
    """
    values = {field.name: getattr(subject, field.name) for field in fields(subject)}
    try:
        _make_checker(subject.__class__).model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, problem["loc"]))
        raise FewlinesError(f"{name}: {where}: {message} (found {problem['input']!r})") from None


@lru_cache
def _make_checker(subject: Any) -> type[BaseModel]:
    hints = get_type_hints(subject, include_extras=True)
    wanted: Any = {field.name: (hints[field.name], ...) for field in fields(subject)}
    # Strict: neither "4" nor True is a number.
    rules = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return create_model(subject.__name__, __config__=rules, **wanted)
