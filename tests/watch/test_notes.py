"""What a person is told that the workers do otherwise than configured."""

import io
from typing import Any

import pytest
from rich.console import Console

from nanovlm.messages import TrialRecord
from nanovlm.watch.terminal.console import RunDisplay
from nanovlm.watch.terminal.search_display import SearchDisplay
from nanovlm.watch.terminal.single_display import SingleDisplay
from tests.records import make_record, make_report
from tests.results.starts import search_start

UNCOMPILED = "compile=true: no compiler [g++]; the model runs uncompiled"
FLOAT32 = "Tesla V100 has no bfloat16: computing in float32"


def record(number: int, state: Any, *notes_of_reports: list[str]) -> TrialRecord:
    """Return a trial with one report for each list of notes."""
    return make_record(
        number,
        state,
        reports=[make_report(1, {}, notes=tuple(notes)) for notes in notes_of_reports],
    )


RECORDS = (
    record(0, "running"),
    record(0, "running", [UNCOMPILED]),
    record(1, "running", []),
    record(0, "completed", [UNCOMPILED], [UNCOMPILED, FLOAT32]),
    record(1, "failed", [FLOAT32]),
)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_search_shows_each_note_once(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=40)
    with SearchDisplay(console) as display:
        display.begin(search_start())
        for changed in RECORDS:
            display.trial_changed(changed)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count(f"note: {UNCOMPILED}") == 1  # as it is, though it is wider than the console
    assert text.count(f"note: {FLOAT32}") == 1
    if is_terminal:
        assert f"\x1b[33mnote: {FLOAT32}" in text


def test_each_note_is_shown_once() -> None:
    console = Console(file=io.StringIO(), width=200)
    display = RunDisplay(console)
    for changed in RECORDS:
        display.trial_changed(changed)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [f"note: {UNCOMPILED}", f"note: {FLOAT32}"]


@pytest.mark.parametrize("display_class", [SearchDisplay, SingleDisplay])
def test_what_is_lost_is_told(display_class: Any) -> None:
    console = Console(file=io.StringIO(), width=200)
    display = display_class(console)
    display.notice("group-0: its controller has ended; trial-0007 goes on")
    assert isinstance(console.file, io.StringIO)
    assert (
        console.file.getvalue() == "note: group-0: its controller has ended; trial-0007 goes on\n"
    )
