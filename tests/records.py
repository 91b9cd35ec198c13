"""Makes records and updates of trials as a search leaves them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanovlm.messages import End, Leg, ProgressUpdate, Report, Speed, TrialRecord, TrialState

ENDS: Mapping[TrialState, End | None] = {
    "running": None,
    "paused": None,
    "completed": End.COMPLETED,
    "stopped": End.PRUNED,
    "failed": End.ERROR,
}
"""The usual end of each state."""


def make_report(samples_seen: int, metrics: Mapping[str, float], **values: Any) -> Report:
    usual = {"step": 1, "seconds": 1.0}
    return Report(**usual | values, samples_seen=samples_seen, metrics={**metrics})


def make_record(
    number: int,
    state: TrialState = "completed",
    metrics: Mapping[str, float] | None = None,
    *,
    samples_seen: int = 100,
    reports: Sequence[Report] | None = None,
    **values: Any,
) -> TrialRecord:
    """Return the record of a trial with these reports, or with one report of these metrics.

    Args:
        values: fields of `TrialRecord`.
    """
    if reports is None:
        reports = [make_report(samples_seen, metrics)] if metrics else []
    fields: dict[str, Any] = {
        "trial_id": f"trial-{number:04d}",
        "parameters": {},
        "config": {},
        "end": ENDS[state],
        "is_paused": state == "paused",
        "submitted_at": 0.0,
        "reports": tuple(reports),
    }
    return one_leg(TrialRecord(**fields | values, number=number))


def one_leg(record: TrialRecord) -> TrialRecord:
    """Return the record of a trial that one group has run at one go."""
    if record.legs or record.worker_group is None or record.ended_at is None:
        return record
    leg = Leg(
        worker_group=record.worker_group,
        first_step_at=record.first_step_at,
        ended_at=record.ended_at,
    )
    return replace(record, legs=(leg,))


def make_speed(**values: Any) -> Speed:
    """Return figures of a training; `values` are those that matter."""
    usual: dict[str, Any] = {
        "samples_per_second": 100.0,
        "answer_tokens_per_second": 400.0,
        "data_wait_fraction": 0.01,
        "model_tflops_per_second": 0.5,
        "model_flops_utilization": None,
        "peak_memory_gib": 1.5,
    }
    return Speed(**usual | values)


def make_update(trial_id: str, samples_seen: int, **values: Any) -> ProgressUpdate:
    """Return how far a trial is; `values` are those that matter."""
    usual: dict[str, Any] = {
        "stage": "training",
        "step": samples_seen,
        "total_samples": 100,
        "train_loss": 1.0,
        "samples_per_second": 2.0,
        "data_wait_fraction": 0.5,
    }
    return ProgressUpdate(**usual | values, trial_id=trial_id, samples_seen=samples_seen)
