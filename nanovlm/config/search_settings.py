"""The sections of a space file besides the searched keys: their fields and rules."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nanovlm.config.database_url import PLACEHOLDER, hide_password
from nanovlm.config.fields import STRICT
from nanovlm.config.metrics import COSTS, Mode, natural_mode

NO_SQLITE = (
    "must not be SQLite, which loses trials when several processes write; leave it out for a file "
    "in the results folder, or name a database server"
)


class _Section(BaseModel):
    model_config = STRICT | ConfigDict(frozen=True)


class Objective(_Section):
    """What makes one trial better than another."""

    metric: str = "mmstar_accuracy"
    """A metric that every report carries; behind the first of several also a cost of training:
    seconds_per_sample, peak_memory_gib or gflops_per_sample."""
    mode: Mode = "max"
    """Left out: as is natural for the metric."""
    at_most: float | None = None
    """Of another objective than the first: the best trial is the best by the first one of those
    that keep this bound."""
    at_least: float | None = None
    """The same, where more is better."""

    @model_validator(mode="before")
    @classmethod
    def _takes_the_natural_mode(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or "mode" in content:
            return content
        metric = content.get("metric")
        natural = natural_mode(metric) if isinstance(metric, str) else None
        return content if natural is None else {**content, "mode": natural}

    @field_validator("at_most", "at_least")
    @classmethod
    def _bounds_the_bad_side(cls, bound: float | None, info: ValidationInfo) -> float | None:
        needed = {"min": "at_most", "max": "at_least"}.get(info.data.get("mode", ""))
        if bound is not None and needed not in (None, info.field_name):
            raise ValueError(f"must be {needed} for {info.data.get('metric')}, of which "
                             f"{'less' if needed == 'at_most' else 'more'} is better")  # fmt: skip
        return bound

    @property
    def all(self) -> "tuple[Objective, ...]":
        """Every objective, the first one first."""
        return (self,)

    def location(self, number: int) -> str:
        """Return the path of objective `number` in a space file."""
        return "objective" if len(self.all) == 1 else f"objective[{number}]"

    @property
    def bound(self) -> float | None:
        return self.at_most if self.at_least is None else self.at_least

    def loss(self, value: float) -> float:
        """Return a number that is smaller the better a value is, and equal for equal ones.

        For a cost it is the logarithm, in steps of what counts as equal.
        """
        if self.metric not in COSTS:
            return -value if self.mode == "max" else value
        step = math.log1p(COSTS[self.metric].equal)
        return step * round(math.log(max(value, 1e-12)) / step)

    def value_at(self, loss: float) -> float:
        """Return the value with such a loss: the inverse of `loss`."""
        if self.metric in COSTS:
            return math.exp(loss)
        return -loss if self.mode == "max" else loss

    def values_in(self, measured: Mapping[str, float]) -> tuple[float, ...]:
        """Return the value of each objective. Raises KeyError if one is not there."""
        return tuple(measured[objective.metric] for objective in self.all)

    def to_yaml(self) -> Any:
        """Return what a space file has for it."""
        return self.model_dump(exclude_none=True)

    def without_bounds(self) -> Any:
        """Return the same for all that a search itself depends on: bounds choose afterwards."""
        return self.model_dump(include={"metric", "mode"})


class SeveralObjectives(Objective):
    """The first of several objectives, which stands where one number is asked for; and all."""

    every: tuple[Objective, ...]

    @property
    def all(self) -> tuple[Objective, ...]:
        return self.every

    def to_yaml(self) -> Any:
        return [objective.to_yaml() for objective in self.all]

    def without_bounds(self) -> Any:
        return [objective.without_bounds() for objective in self.all]


_MOST_OBJECTIVES = 3


def join(objectives: Objective | Sequence[Objective]) -> Objective:
    """Return one objective that stands for all. Raises ValueError if they contradict."""
    given = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    metrics = [objective.metric for objective in given]
    if not 1 <= len(given) <= _MOST_OBJECTIVES:
        raise ValueError(f"must be one objective or a list of at most {_MOST_OBJECTIVES}")
    if twice := next((metric for metric in metrics if metrics.count(metric) > 1), None):
        raise ValueError(f"{twice} stands there twice")
    first = given[0]
    if first.bound is not None:
        raise ValueError(
            f"the best by the first objective is taken, so a bound of {first.metric} chooses "
            "nothing; give bounds of the others"
        )
    if len(given) == 1:
        return first
    if first.metric in COSTS:
        raise ValueError(
            f"the first one must say how good a model is, and {first.metric} is a cost of training"
        )
    return SeveralObjectives(metric=first.metric, mode=first.mode, every=given)


_SIZES: dict[str, Any] = {"minItems": 1, "maxItems": _MOST_OBJECTIVES}

ONE, SEVERAL = "one objective", "several objectives"
"""Tags of what stands at `objective`."""

AnyObjective = Annotated[
    Annotated[Objective, Tag(ONE)]
    | Annotated[tuple[Objective, ...], Field(strict=False, json_schema_extra=_SIZES), Tag(SEVERAL)],
    Discriminator(lambda content: SEVERAL if isinstance(content, list | tuple) else ONE),
    AfterValidator(join),
]


class Sampler(_Section):
    """Where the next trial's values come from."""

    name: Literal["auto", "tpe", "gp", "cmaes", "qmc", "random"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0


class Scheduler(_Section):
    """When a trial is stopped before its full budget."""

    name: Literal["asha", "hyperband", "pasha", "none"] = "asha"
    type: Literal["pausing", "stopping"] | None = None
    """Of `asha`: whether a trial waits at a milestone until it is among the best there, or goes on
    or ends at once. null: pausing."""
    rungs: Annotated[int, Field(ge=1, le=64)] = 3
    """Milestones at which trials are compared, the end of the full budget included."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One of so many trials goes on past a milestone; each milestone is so many times the last."""
    max_paused: PositiveInt | None = None
    """States of paused trials that are kept on the disk at most; a trial that was let go trains
    again from its start if it goes on. null: as many as the disk has room for."""

    @model_validator(mode="after")
    def _only_asha_pauses(self) -> Self:
        if self.type == "pausing" and self.name != "asha":
            raise ValueError(f"type: pausing is for the scheduler asha, not for {self.name}")
        if self.max_paused is not None and not self.pauses:
            raise ValueError("max_paused: is for trials that pause (name: asha, type: pausing)")
        return self

    @property
    def pauses(self) -> bool:
        return self.name == "asha" and self.type != "stopping"


class Budget(_Section):
    """When the search ends: at whichever limit is reached first."""

    trials: PositiveInt | None = None
    hours: PositiveFloat | None = None
    gpu_hours: PositiveFloat | None = None
    target: float | None = None
    """A value of the objective that is good enough."""
    patience: PositiveInt | None = None
    """Trials in a row that ran their full budget or were stopped, none of them a new best."""

    def seconds_left(self, spent_seconds: float) -> float | None:
        """Return what is left of the hours, None if they are not limited."""
        return None if self.hours is None else self.hours * 3600 - spent_seconds


class Study(_Section):
    """Where Optuna keeps the search."""

    storage: str | None = None
    """URL of a database, such as postgresql+psycopg://USER:${NANOVLM_DB_PASSWORD}@HOST/NAME with
    the environment variable of that name; the default is a file in the results folder."""
    name: str | None = None
    """Of the study in the database; the default is the name of the results folder."""

    @field_validator("storage")
    @classmethod
    def _takes_parallel_writers(cls, storage: str | None) -> str | None:
        if storage is not None and storage.startswith("sqlite"):
            raise ValueError(NO_SQLITE)
        return storage

    def without_password(self) -> "Study":
        """Return the section as it may be written to files; it gives the same study again, where
        the environment has the password."""
        written = self.storage and hide_password(self.storage, PLACEHOLDER)
        return self.model_copy(update={"storage": written})

    @property
    def shown_storage(self) -> str | None:
        """The URL as a person may see it."""
        return self.storage and hide_password(self.storage)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the password: Ray writes what it is given to files."""
        return type(self).model_validate, (self.without_password().model_dump(),)


JUDGED_SEEDS = 3
"""So many fresh seeds, of a configuration and of the default one, a verdict needs to be likely:
with two, the spread between seeds is all but unknown."""


_RUNS = 8
"""Of a race: 3 configurations and the default one on a seed, then the best of them on two more."""


class Confirm(_Section):
    """The race on fresh seeds that decides between the best configurations after the search."""

    top: Annotated[int, Field(ge=0)] = 6
    """So many configurations are raced at most, beside the default one; 0 confirms nothing."""
    runs: Annotated[int, Field(ge=2)] | None = None
    """Full trainings in all, at most; null: 8."""
    seeds: PositiveInt | None = None
    """In place of runs: so many for each of the best 3 configurations and the default one."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the benchmark's questions that only these runs are asked."""

    @field_validator("seeds")
    @classmethod
    def _is_alone(cls, seeds: int | None, info: ValidationInfo) -> int | None:
        if seeds is not None and info.data.get("runs") is not None:
            raise ValueError(f"must be left out beside confirm.runs={info.data['runs']}")
        return seeds

    @property
    def most_runs(self) -> int:
        if not self.top:
            return 0
        if self.seeds is not None:
            return (min(self.top, 3) + 1) * self.seeds
        return _RUNS if self.runs is None else self.runs

    @property
    def num_raced(self) -> int:
        """How many configurations enter the race, beside the default one: as many as leave
        `JUDGED_SEEDS` runs to the best of them and to the default one."""
        return min(self.top, max(1, self.most_runs - 1 - 2 * (JUDGED_SEEDS - 1)))


class TrialResources(_Section):
    """What one trial occupies."""

    workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1
    gpus_per_worker: NonNegativeFloat = 0
    stall_minutes: PositiveFloat | None = None
    """A trial without a sign of life for so long goes on in another worker group; null: ten times
    the longest silence seen so far, and at least five minutes."""

    def occupied(self) -> dict[str, float]:
        """Return what a trial occupies, without the rules for it."""
        return self.model_dump(exclude={"stall_minutes"})

    @property
    def per_worker(self) -> dict[str, float]:
        """What a worker occupies, by Ray's names; without what it does not need."""
        needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {kind: amount for kind, amount in needs.items() if amount}

    @property
    def gpus_per_trial(self) -> float:
        return self.workers * self.gpus_per_worker


class SpaceFile(_Section):
    """A space file as it is written."""

    preset: str = "nanovlm-222m"
    base: dict[str, Any] = {}
    search: Annotated[dict[str, Any], Field(min_length=1)]
    objective: AnyObjective = Objective()
    """What trials are compared by; a list of two or three for a Pareto front."""
    sampler: Sampler = Sampler()
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget(trials=32)
    confirm: Confirm = Confirm()
    study: Study = Study()
    warm_start: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Results folders of earlier searches, whose trials the sampler learns from."""
    resources: TrialResources = TrialResources()


SECTIONS = tuple(SpaceFile.model_fields)
SETTINGS = SECTIONS[3:]
"""Those that describe no configuration."""
