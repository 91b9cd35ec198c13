"""Records as lines of JSON: the only module that writes and reads them.

    file.write(record_line(record))
    record = read_record(line)

A line has the fields of `TrialRecord`, and `state`, `is_infeasible`, `samples_seen` and `metrics`,
which follow from them, for readers that are not this program.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nanovlm.errors import plain_rule
from nanovlm.messages import End, Kind, Report, TrialRecord

_RECORD = TypeAdapter(TrialRecord)
_REPORTS = TypeAdapter(tuple[Report, ...])

_DERIVED = ("state", "is_infeasible", "samples_seen", "metrics")
FIELDS = (
    "trial_id", "kind", "number", "parameters", "config", "state", "is_paused", "end", "reason",
    "is_infeasible", "samples_seen", "metrics", "reports", "submitted_at", "first_step_at",
    "ended_at", "worker_group", "legs",
)  # fmt: skip
"""Of a line, in their order."""


def record_line(record: TrialRecord) -> str:
    content = _RECORD.dump_python(record, mode="json")
    content |= {name: getattr(record, name) for name in _DERIVED}
    return json.dumps({name: content[name] for name in FIELDS}) + "\n"


def read_record(line: str) -> TrialRecord:
    """Return the record of a line, which an earlier version of the program may have written.

    Raises:
        ValueError: it is no record; the message is one line.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"must be an object, got {line[:40]!r}")
    content = _upgraded(content)
    try:
        return _RECORD.validate_python({k: v for k, v in content.items() if k not in _DERIVED})
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {plain_rule(first['msg'])}") from None


def reports_to_json(reports: Sequence[Report]) -> Any:
    return _REPORTS.dump_python(tuple(reports), mode="json")


def reports_from_json(content: Any) -> tuple[Report, ...]:
    """Return the reports of `reports_to_json`. Raises ValueError if the content is none."""
    return _REPORTS.validate_python(content)


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a line with the fields that earlier versions did not write."""
    upgraded = {"legs": _earlier_legs(content), **content}
    if "end" not in content:
        is_confirming = str(content.get("trial_id", "")).startswith("confirm-")
        upgraded["kind"] = Kind.CONFIRM if is_confirming else Kind.TRIAL
        upgraded["end"] = _earlier_end(content)
    return upgraded


def _earlier_legs(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the one leg that a trial had before there were pauses."""
    leg = {name: content.get(name) for name in ("worker_group", "first_step_at", "ended_at")}
    return [] if leg["worker_group"] is None or leg["ended_at"] is None else [leg]


def _earlier_end(content: Mapping[str, Any]) -> End | None:
    """Return the end of a trial from the state and reason that earlier versions wrote."""
    reason = content.get("reason") or ""
    match content.get("state"), bool(content.get("is_infeasible")):
        case "completed", _:
            return End.COMPLETED
        case "stopped", _:
            return End.SEARCH_ENDED if reason.startswith(_EARLIER_SEARCH_ENDS) else End.PRUNED
        case "failed", True:
            is_memory = reason.startswith("out of memory")
            return End.OUT_OF_MEMORY if is_memory else End.NOT_FINITE
        case "failed", False:
            return End.ERROR
    raise ValueError(f"state: must be completed, stopped or failed, got {content.get('state')!r}")


_EARLIER_SEARCH_ENDS = (
    "budget.",
    "study.storage:",
    "objective.metric:",
    "5 trials in a row failed",
    "all worker groups have ended",
)
