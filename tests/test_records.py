"""A record is the same after its way through a line of JSON, and lines of others are refused."""

import json
from typing import Any

import pytest

from nanovlm.messages import End, Kind, Leg, TrialRecord
from nanovlm.records import FIELDS, read_record, record_line
from tests.records import make_record, make_report, make_speed

RECORDS = [
    make_record(0),
    make_record(7, "running", submitted_at=1.25),
    make_record(
        1,
        "completed",
        parameters={"lr_mp": 0.1 + 0.2, "freeze": "none", "compile": True},
        config={"seed": 3, "vlm": {"lm_dropout": 0.0}, "betas": [0.9, 0.95]},
        reports=[
            make_report(32, {"mmstar_accuracy": 1 / 3}, notes=("uncompiled",)),
            make_report(64, {"mmstar_accuracy": 0.5}, speed=make_speed(), is_final=True),
        ],
        first_step_at=1764147600.123456,
        ended_at=1764147601.654321,
        worker_group="group-0",
        legs=(
            Leg(worker_group="group-1", first_step_at=1764147600.123456, ended_at=1764147600.5),
            Leg(worker_group="group-0", first_step_at=None, ended_at=1764147601.654321),
        ),
    ),
    make_record(2, "failed", trial_id="confirm-2-seed-1", kind=Kind.CONFIRM, reason="größer"),
    *(make_record(3, end=end, reason="") for end in End),
    make_record(8, "paused", {"mmstar_accuracy": 0.5}),
]


@pytest.mark.parametrize("record", RECORDS)
def test_there_and_back(record: TrialRecord) -> None:
    line = record_line(record)
    assert line.endswith("\n") and "\n" not in line[:-1]
    assert read_record(line) == record
    content = json.loads(line)
    assert tuple(content) == FIELDS
    assert content["state"] == record.state and content["metrics"] == record.metrics


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ({"state": "completed"}, End.COMPLETED),
        ({"state": "stopped", "reason": "mmstar_accuracy 0.2 below 0.3"}, End.PRUNED),
        ({"state": "stopped", "reason": "budget.hours: 1 hours have passed"}, End.SEARCH_ENDED),
        (
            {"state": "failed", "is_infeasible": True, "reason": "out of memory: a"},
            End.OUT_OF_MEMORY,
        ),
        ({"state": "failed", "is_infeasible": True, "reason": "loss is nan"}, End.NOT_FINITE),
        ({"state": "failed", "reason": "OSError: gone"}, End.ERROR),
    ],
)
@pytest.mark.parametrize("kind", Kind)
def test_a_line_of_an_earlier_version(written: dict[str, Any], end: End, kind: Kind) -> None:
    content = json.loads(record_line(RECORDS[2]))
    content |= {"trial_id": f"{kind}-0001"} | written
    for report in content["reports"]:
        for name in ("evaluation_seconds", "speed", "notes", "first_step_seconds", "is_final"):
            del report[name]
    del content["end"], content["kind"], content["is_paused"], content["legs"]
    record = read_record(json.dumps(content))
    assert (record.end, record.kind) == (end, kind)
    assert record.metrics == {"mmstar_accuracy": 0.5}
    (leg,) = record.legs
    assert (leg.worker_group, leg.first_step_at, leg.ended_at) == (
        "group-0", 1764147600.123456, 1764147601.654321,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": "tired"}, "end: must be 'completed', 'pruned',"),
        ({"number": "seven"}, "number: must be a valid integer"),
        ({"reports": [{"step": 1}]}, r"reports\.0\.samples_seen: field required"),
        ({"reports": None}, "reports: must be a valid tuple"),
        ({"config": []}, "config: must be a valid dictionary"),
    ],
)
def test_what_is_no_record_is_refused(change: dict[str, Any], message: str) -> None:
    line = json.dumps(json.loads(record_line(RECORDS[2])) | change)
    with pytest.raises(ValueError, match=f"^{message}"):
        read_record(line)


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", "7", '{"end": 1}', '{"state": []}', "{"])
def test_any_other_line_is_refused_in_one_line(line: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_record(line)
    assert "\n" not in str(caught.value)
