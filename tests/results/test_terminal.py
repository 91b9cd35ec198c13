"""The lines that a person sees of a trial, from made-up records."""

import io
from typing import Any

import pytest
from rich.console import Console

import run_single
from nanovlm.messages import TrialRecord
from nanovlm.results.summary import Objective
from nanovlm.results.terminal import SearchDisplay, describe_speed

METRICS = {"mmstar_accuracy": 0.5, "train_loss": 1.25}
SPEED = {
    "samples_per_second": 812.4,
    "answer_tokens_per_second": 3000.0,
    "data_wait_fraction": 0.004,
    "model_tflops_per_second": 400.0,
    "model_flops_utilization": 0.411,
    "peak_memory_gib": 20.0,
}


def record(speed: dict[str, Any] | None) -> TrialRecord:
    entry: dict[str, Any] = {"samples_seen": 100, "step": 10, "seconds": 2.0, "metrics": METRICS}
    if speed is not None:
        entry |= {"speed": speed, "evaluation_seconds": 1.0}
    return TrialRecord(
        trial_id="trial-0003",
        number=3,
        parameters={"lr_mp": 0.01},
        config={},
        state="completed",
        samples_seen=100,
        metrics=METRICS,
        reports=(entry,),
        submitted_at=0.0,
    )


def plain_console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=200), file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "812 samples/s, data 0.4 %, MFU 41 %"),
        ({"model_flops_utilization": None}, "812 samples/s, data 0.4 %"),
        ({"samples_per_second": 3.42}, "3.4 samples/s, data 0.4 %, MFU 41 %"),
        (
            {"samples_per_second": 12_345.6, "model_flops_utilization": 0.0833},
            "12346 samples/s, data 0.4 %, MFU 8.3 %",
        ),
    ],
)
def test_the_speed_in_short(changes: dict[str, Any], expected: str) -> None:
    assert describe_speed(record(SPEED | changes)) == expected


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (SPEED, "lr_mp=0.01  2 s  812 samples/s, data 0.4 %, MFU 41 %"),
        (None, "lr_mp=0.01  2 s"),  # written down by an earlier version
    ],
)
def test_the_line_of_an_ended_trial(speed: dict[str, Any] | None, expected: str) -> None:
    console, file = plain_console()
    with SearchDisplay(console, Objective("mmstar_accuracy", "max"), 4) as display:
        display.update(record(speed))
    (line,) = file.getvalue().splitlines()
    assert line.startswith("trial 3   completed  0.5 ")
    assert line.endswith(expected)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [(SPEED, "(2.0 s, 812 samples/s, data 0.4 %, MFU 41 %)"), (None, "(2.0 s)")],
)
def test_the_line_of_a_single_run_s_report(speed: dict[str, Any] | None, expected: str) -> None:
    console, file = plain_console()
    run_single.show_progress(console, record(speed))
    expected = f"100 samples, step 10: train_loss 1.2500, mmstar_accuracy 0.5  {expected}"
    assert file.getvalue().splitlines() == [expected]
