"""The frozen messages that layers and processes exchange."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import Any, Literal, Self

from nanovlm.config.metrics import COSTS
from nanovlm.config.schema import TrainConfig

RUN_ID = re.compile(r"trial-\d{4,}|confirm-\d+-seed-\d+")
"""Ids of runs, which their files and folders bear too."""


class Decision(Enum):
    """What a trial does after a report."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """It frees its worker group and waits for CONTINUE or STOP."""
    STOP = "stop"


class Order(Enum):
    """The broker's answer to a worker group for which it has no job."""

    RETRY = "ask again"
    SHUTDOWN = "go home"


class Kind(StrEnum):
    """The purpose of a run."""

    TRIAL = "trial"
    """One of the search's trials, or a single run."""
    CONFIRM = "confirm"
    """A run after the search, which trains the configuration of a trial again on another seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One trial to run."""

    trial_id: str
    config: TrainConfig
    kind: Kind = Kind.TRIAL
    number: int = 0
    """Index of the trial in its search, from 0; of a confirming run, that of its trial."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The values of the searched keys, which `config` has too."""
    milestones: tuple[int, ...] = ()
    """Samples seen at which to report besides the end, ascending. Each report is made at the first
    optimizer step that reaches its milestone."""
    checkpoint: str | None = None
    """Folder of a model checkpoint (`save_pretrained`) to start from instead of initial weights."""
    output_dir: str | None = None
    """Folder that receives the model of the final report; None keeps no model."""
    state_dir: str | None = None
    """Folder for the state of the training, replaced before each report but the final one; a trial
    that finds a state there repeats the reports before it and continues from it. None keeps
    none."""
    answers_file: str | None = None
    """File that receives the answers to the benchmark, replaced at each report; None keeps none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A job that a worker group has taken on."""

    job: Job
    lease: int
    """The group sends it with each message about the job. It ends when another group gets the job,
    so that messages of a group which was taken for lost are ignored."""
    seconds_between_updates: float = 0.0
    """At least, between two progress updates: with many groups they would be most of what the
    broker has to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """A message to the user."""

    text: str
    ends_run: bool = False
    """Whether the run has to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast a trial has trained since its last report, without evaluation, all workers together.

    It is not among the metrics: those repeat to the bit.
    """

    samples_per_second: float
    answer_tokens_per_second: float
    """Tokens with a loss: those of the answers, and EOS."""
    data_wait_fraction: float
    """Share of the time spent waiting for a batch; of the worker that waited longest."""
    model_tflops_per_second: float
    """10^12 useful floating-point operations a second (`training/flops.py`)."""
    model_flops_utilization: float | None
    """Share of what the GPUs could do at best; None on the CPU and on GPUs without a known peak."""
    peak_memory_gib: float
    """The peak of any worker. On a GPU: tensors, since the trial began. On the CPU: the whole
    process since its start, earlier trials included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The state of a trial at a milestone or at its end."""

    samples_seen: int
    step: int
    """Optimizer steps taken."""
    metrics: dict[str, float]
    """Always with the objective, e.g. `mmstar_accuracy`."""
    seconds: float
    """Seconds since the trial started, with evaluation, without pauses."""
    first_step_seconds: float = 0.0
    """Seconds from the trial's start to the end of the first optimizer step in this leg."""
    evaluation_seconds: float = 0.0
    """Seconds that the evaluation of this report took."""
    speed: Speed | None = None
    """None if it was not measured."""
    is_final: bool = False
    """True for the report after the last step of the full budget."""
    notes: tuple[str, ...] = ()
    """What the trial's workers did differently from the configuration, and why."""


def measured(report: Report) -> dict[str, float]:
    """Return the metrics and costs of a report; without costs if no speed was measured."""
    if report.speed is None:
        return report.metrics
    return {**report.metrics, **{name: cost.of(report.speed) for name, cost in COSTS.items()}}


Stage = Literal["training", "evaluating"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressUpdate:
    """The progress of a running trial between two reports; about one a second."""

    trial_id: str
    stage: Stage
    step: int
    """Optimizer steps taken."""
    samples_seen: int
    total_samples: int
    """Samples of the trial's full budget."""
    train_loss: float
    """Loss per answer token, smoothed over some twenty steps."""
    samples_per_second: float
    """Over the last second or so of training, all workers together; 0 if there was none."""
    data_wait_fraction: float
    """Share of that time in which the first worker waited for a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """The progress of preparing a data set."""

    what: str
    """`training data` or `benchmark`."""
    stage: Literal["text", "images", "waiting"]
    """Waiting: another process prepares the same."""
    done: int
    total: int
    """Rows whose text is encoded, or images."""


TrialState = Literal["running", "paused", "completed", "stopped", "failed"]


class End(StrEnum):
    """Why a trial is over."""

    COMPLETED = "completed"
    """Its full budget is trained."""
    PRUNED = "pruned"
    """The scheduler stopped it after a comparison with other trials."""
    SEARCH_ENDED = "search_ended"
    """The search ended, by a limit of its budget or by a fault, before the trial did."""
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    """The loss, a gradient or a metric became NaN or infinite."""
    WORKERS_DIED = "workers_died"
    """Its workers died repeatedly without a new report."""
    ERROR = "error"
    """Any other failure; it says nothing about the trial's values."""

    @property
    def state(self) -> TrialState:
        if self is End.COMPLETED:
            return "completed"
        return "stopped" if self in (End.PRUNED, End.SEARCH_ENDED) else "failed"

    @property
    def is_infeasible(self) -> bool:
        """Whether the trial failed because of its values."""
        return self in (End.OUT_OF_MEMORY, End.NOT_FINITE, End.WORKERS_DIED)

    @property
    def was_compared(self) -> bool:
        """Whether the trial completed or lost a comparison."""
        return self in (End.COMPLETED, End.PRUNED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """The uninterrupted work of one worker group on a trial. A trial that pauses, or whose group is
    lost, has several. Times are those of `TrialRecord`."""

    worker_group: str
    first_step_at: float | None
    """End of its first optimizer step; None if it failed before."""
    ended_at: float
    """When its last work was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """Everything about a trial; a line of `paused.jsonl` whenever it pauses, and of `trials.jsonl`
    once it has ended.

    Times are seconds since the epoch. `first_step_at` and `ended_at` are read from the clock of
    the worker, so that their difference over consecutive legs of one group is exact.
    """

    trial_id: str
    number: int
    kind: Kind = Kind.TRIAL
    parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    end: End | None = None
    """None while it runs or is paused, and if it was interrupted."""
    is_paused: bool = False
    """Whether it waits until the search resumes it."""
    reason: str | None = None
    """In words: why the trial failed or was stopped."""
    reports: tuple[Report, ...] = ()
    submitted_at: float
    first_step_at: float | None = None
    """End of the first optimizer step."""
    ended_at: float | None = None
    """When the last work was done: the last report handed in, or the failure."""
    worker_group: str | None = None
    """The group that works on it, or was the last to do so."""
    legs: tuple[Leg, ...] = ()
    """In order; without those that were lost before a report."""

    @property
    def state(self) -> TrialState:
        if self.end is None:
            return "paused" if self.is_paused else "running"
        return self.end.state

    @property
    def is_infeasible(self) -> bool:
        """Whether the trial failed because of its values."""
        return self.end is not None and self.end.is_infeasible

    @property
    def confirms(self) -> bool:
        """Whether it is a run after the search that confirms a trial's configuration."""
        return self.kind is Kind.CONFIRM

    @property
    def samples_seen(self) -> int:
        """At the last report."""
        return self.reports[-1].samples_seen if self.reports else 0

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the last report."""
        return self.reports[-1].metrics if self.reports else {}

    def ended(self, end: End, reason: str | None, at: float | None) -> Self:
        """Return the record of the trial after its end."""
        return replace(self, end=end, reason=reason, ended_at=at, is_paused=False)
