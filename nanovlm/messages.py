"""The few frozen values that travel between the layers, and between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from nanovlm.config import TrainConfig


class Decision(Enum):
    """What a trial does after a report."""

    CONTINUE = "continue"
    STOP = "stop"


class Order(Enum):
    """What a worker group is told when there is no job for it."""

    ASK_AGAIN = "ask again"
    GO_HOME = "go home"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One trial to run."""

    trial_id: str
    config: TrainConfig
    number: int = 0
    """Place of the trial in its search, from 0."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The values of the searched keys; they are in `config` too."""
    milestones: tuple[int, ...] = ()
    """Samples seen at which to report besides the end, ascending. Each report is made at the first
    optimizer step that reaches its milestone."""
    checkpoint: str | None = None
    """Folder of a model checkpoint (`save_pretrained`) to start from instead of initial weights."""
    output_dir: str | None = None
    """Folder that receives the model of the final report; None keeps no model."""
    state_dir: str | None = None
    """Folder for the state of the training, replaced before each report but the final one; a trial
    that finds a state there makes the reports before it again and goes on from it. None keeps
    none."""
    answers_file: str | None = None
    """File that receives the answers to the benchmark, replaced at each report; None keeps none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast a trial trained since its report before, evaluation left out; of all its workers.

    Apart from the metrics: those are the same at every run, to the bit.
    """

    samples_per_second: float
    answer_tokens_per_second: float
    """Tokens that are learnt: those of the answers, and EOS."""
    data_wait_fraction: float
    """Share of the time in which the compute had to wait for a batch; of the worker that waited
    longest."""
    model_tflops_per_second: float
    """10^12 useful floating-point operations a second (`training/flops.py`)."""
    model_flops_utilization: float | None
    """Share of what the GPUs could do at best; None on the CPU and on GPUs without a known peak."""
    peak_memory_gib: float
    """Most memory that a worker has occupied so far. On a GPU: tensors, since the trial began. On
    the CPU: the whole process, since it began, earlier trials included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a trial has reached; made exactly at each milestone and at the end."""

    samples_seen: int
    step: int
    """Optimizer steps taken."""
    metrics: dict[str, float]
    """Always with the objective, e.g. `mmstar_accuracy`."""
    checkpoint: str | None = None
    """Folder of the saved model, if one was saved with this report."""
    seconds: float
    """Seconds since the trial started, evaluation included."""
    first_step_seconds: float
    """Seconds from the trial's start to the end of its first optimizer step."""
    evaluation_seconds: float = 0.0
    """Seconds that the evaluation of this report took."""
    speed: Speed | None = None
    """None if it was not measured."""
    is_final: bool = False
    """True for the report after the last step of the full budget."""
    notes: tuple[str, ...] = ()
    """What the trial's workers have done so far otherwise than configured, and why."""


Stage = Literal["training", "evaluating"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """How far a running trial is, between two reports; about one a second."""

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
    """Over the last second or so of training, of all workers of the trial together; 0 if there has
    been none."""
    data_wait_fraction: float
    """Share of that time in which the compute of the first worker waited for a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """How far the preparation of a data set is."""

    what: str
    """What the data is called: `training data` or `benchmark`."""
    stage: Literal["text", "images", "waiting"]
    """Waiting: another process prepares the same."""
    done: int
    total: int
    """Rows whose text is encoded, or images."""


TrialState = Literal["running", "completed", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """All that is known of a trial; a line of `trials.jsonl` once it has ended.

    Times are seconds since the epoch. `first_step_at` and `ended_at` are read from the clock of
    the worker, so that their difference over consecutive trials of one group is exact.
    """

    trial_id: str
    number: int
    parameters: Mapping[str, Any]
    config: Mapping[str, Any]
    state: TrialState
    reason: str | None = None
    """Why the trial failed or was stopped."""
    is_infeasible: bool = False
    """Failed by its own values: out of memory, or a number that is not finite."""
    samples_seen: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those of the last report."""
    reports: tuple[Mapping[str, Any], ...] = ()
    """`samples_seen, step, seconds, evaluation_seconds, speed, metrics, notes` of each report;
    those of an earlier version have no `evaluation_seconds`, `speed` and `notes`."""
    submitted_at: float
    first_step_at: float | None = None
    """End of the first optimizer step."""
    ended_at: float | None = None
    """When the last work was done: the last report handed in, or the failure."""
    worker_group: str | None = None
    checkpoint: str | None = None
    """Folder that the trial wrote its final model to; not in `trials.jsonl`."""

    @property
    def confirms(self) -> bool:
        """Whether it is a run after the search, which confirms the configuration of a trial."""
        return self.trial_id.startswith("confirm-")
