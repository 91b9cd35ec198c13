"""Types of a configuration's fields, with their bounds, and the range over which one is searched.

A field that can be searched carries its natural range in its metadata (`tunable`); that is what
`NAME: default` in a space file means.
"""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"must name each once, but has several times {', '.join(twice)}")
    return names


Ratio = Annotated[float, Field(ge=0, lt=1)]
NameList = Annotated[
    tuple[str, ...], Field(strict=False, min_length=1), AfterValidator(_all_different)
]
PathList = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_all_different)]
Weights = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]
Scalar = bool | int | float | str | None
_THREE = Field(strict=False, min_length=3, max_length=3)
Channels = Annotated[tuple[float, ...], _THREE]
PositiveChannels = Annotated[tuple[PositiveFloat, ...], _THREE]


@dataclasses.dataclass(frozen=True, slots=True)
class Tunable:
    """The natural search range of a field: a kind of the space file and its argument."""

    kind: Literal["uniform", "log_uniform", "int", "log_int", "choice"]
    values: tuple[Scalar, ...]
    """`(low, high)` of a range, or the choices."""

    def __str__(self) -> str:
        return f"{self.kind} {json.dumps(self.values)}"


def tunable(default: Any, kind: Any, *values: Scalar) -> Any:
    """Return a dataclass field that can be searched over `kind` of `values`."""
    return dataclasses.field(default=default, metadata={"tunable": Tunable(kind, values)})
