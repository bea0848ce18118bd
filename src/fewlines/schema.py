"""What sections of a configuration are made of: their base class and the types of their values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["auto", "float32", "bfloat16"]
Storage = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the experiment. Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
