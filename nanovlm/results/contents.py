"""What the readers of a results folder rely on in its files; what is there besides is let be."""

from typing import Any, NotRequired

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, TypeAdapter
from typing_extensions import TypedDict

from nanovlm.config.search_settings import Objective


class _Summary(BaseModel):
    """The content of `summary.json`."""

    model_config = ConfigDict(strict=True, extra="allow")

    objective: Objective
    wall_seconds: NonNegativeFloat
    gpu_hours: float
    training_seconds: float
    trials: dict[str, int]
    best: dict[str, Any] | None
    confirmation: dict[str, Any] | None = None
    pareto: "_Pareto | None" = None
    ended_by: str | None = None


class _Pareto(BaseModel):
    """Of several objectives."""

    model_config = ConfigDict(strict=True, extra="allow")

    objectives: list[Objective]


class _Data(BaseModel):
    """The content of `data.json`."""

    model_config = ConfigDict(strict=True, extra="allow")

    training: dict[str, Any]
    benchmark: dict[str, Any]


class _Environment(BaseModel):
    """The content of `environment.json`."""

    model_config = ConfigDict(strict=True, extra="allow")

    python: str
    packages: dict[str, str | None]


class _Decision(BaseModel):
    """A line of `rungs.jsonl`: what became of a trial at a milestone."""

    model_config = ConfigDict(strict=True, extra="allow")

    number: int
    milestone: int
    samples_seen: int
    value: float
    goes_on: bool
    reason: str
    is_paused: bool = False


class _Withdrawn(BaseModel):
    """The other kind of line there: the decisions of a trial do not count any more."""

    model_config = ConfigDict(strict=True)

    withdrawn: int


class Answer(TypedDict):
    """A line of a file of answers."""

    index: int
    answer: str
    output: NotRequired[str]
    correct: bool
    letter: str
    letter_nll: NotRequired[float]


ANSWER = TypeAdapter(Answer)
SUMMARY, DATA = TypeAdapter(_Summary), TypeAdapter(_Data)
ENVIRONMENT = TypeAdapter(_Environment)
VERDICT = TypeAdapter(_Decision | _Withdrawn)
