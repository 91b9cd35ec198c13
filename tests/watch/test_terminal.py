"""What a person sees of a run, from made-up records and updates."""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from nanovlm.config.search_settings import Budget, Objective
from nanovlm.messages import End, Kind, ProgressUpdate, Speed, Stage, TrialRecord
from nanovlm.results.summary import summarize
from nanovlm.results.write import ResultsStore
from nanovlm.watch.terminal.console import can_redraw
from nanovlm.watch.terminal.search_display import (
    SearchDisplay,
    budget_bar,
    describe_budget,
    nearest_limit,
    running_table,
)
from nanovlm.watch.terminal.single_display import SingleDisplay
from nanovlm.watch.terminal.tables import describe_duration, describe_speed
from tests.records import make_record, make_report, make_speed
from tests.results.starts import REPOSITORY, search_start, single_start

METRICS = {"mmstar_accuracy": 0.5, "mmstar_num_items": 1224.0, "train_loss": 1.25}
SPEED = make_speed(
    samples_per_second=812.4, data_wait_fraction=0.004, model_flops_utilization=0.411
)


def record(
    number: int = 3,
    speed: Speed | None = SPEED,
    metrics: Mapping[str, float] = METRICS,
    **changes: Any,
) -> TrialRecord:
    report = make_report(100, metrics, step=10, seconds=2.0, speed=speed, evaluation_seconds=1.0)
    known: dict[str, Any] = {
        "parameters": {"lr_mp": 0.01},
        "config": {"seed": 1},
        "reports": [report],
        "submitted_at": float(number),
        "worker_group": "group-0",
    }
    return make_record(number, changes.pop("state", "completed"), **known | changes)


def running(number: int, **changes: Any) -> TrialRecord:
    return record(number, state="running", reports=(), **changes)


def update(
    number: int, samples: int, stage: Stage = "training", rate: float = 30.0
) -> ProgressUpdate:
    return ProgressUpdate(
        trial_id=f"trial-{number:04d}",
        stage=stage,
        step=samples // 10,
        samples_seen=samples,
        total_samples=900,
        train_loss=0.71234,
        samples_per_second=rate,
        data_wait_fraction=0.016,
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(renderable: Any, width: int) -> list[str]:
    """Return the lines of something that is drawn on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return written(console).splitlines()


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
    assert describe_speed(record(speed=replace(SPEED, **changes))) == expected


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (SPEED, "lr_mp=0.01  2 s  812 samples/s, data 0.4 %, MFU 41 %"),
        (None, "lr_mp=0.01  2 s"),  # written down by an earlier version
    ],
)
def test_the_line_of_an_ended_trial(speed: Speed | None, expected: str) -> None:
    console = plain_console()
    with SearchDisplay(console) as display:
        display.begin(search_start())
        display.trial_changed(record(speed=speed))
    line = written(console).splitlines()[-1]
    assert line.startswith("trial 3   completed  0.500 [0.472, 0.528] ")
    assert line.endswith(expected)


def paused(number: int, samples_seen: int = 100) -> TrialRecord:
    return record(number, state="paused", reports=[make_report(samples_seen, METRICS)])


def test_trials_that_wait_are_counted_by_their_milestones() -> None:
    console = plain_console()
    with SearchDisplay(console) as display:
        display.begin(search_start())  # which compares trials at 100 and 300 samples
        display.trial_changed(paused(5))  # of an earlier run: no news
        for number, samples in ((0, 100), (1, 128), (2, 320), (3, 100), (4, 100)):
            display.trial_changed(running(number))
            display.trial_changed(paused(number, samples))
        display.trial_changed(replace(paused(3), is_paused=False))
        display.trial_changed(record(4, end=End.PRUNED))
        (counts,) = shown(display._counts(), 200)
        assert counts.strip().endswith(
            "1 stopped   0 failed   4 paused (3 at 100 samples, 1 at 300)"
        )
        assert list(display._left_behind()) == [
            "1 never went on (1 at 100 samples)",
            "4 paused (3 at 100 samples, 1 at 300)",
        ]
        assert [*display._running] == ["trial-0003"]
    lines = [line for line in written(console).splitlines() if line.startswith("trial")]
    assert [line.split()[1:3] for line in lines] == [
        *([str(number), "paused"] for number in range(5)),
        ["4", "stopped"],
    ]


def test_what_a_search_says_when_it_begins() -> None:
    console = plain_console()
    with SearchDisplay(console) as display:
        display.begin(search_start())
    assert written(console).splitlines() == [
        "digits: trials of 900 samples, compared at 100, 300",
        "searched: lr_mp, lr_backbones, batch_size; objective: mmstar_accuracy (lmms-eval-0.7.2); "
        "budget: 16 trials; 2 at once",
        "results: results/digits",
        "own Ray cluster, dashboard: http://127.0.0.1:8265 (token: `ray get-auth-token`)",
        "data: 900 samples of 300 rows, 1224 questions",
    ]


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_terminal_is_left_clean(is_quiet: bool) -> None:
    """Also by an exception: the cursor is shown again, and nothing live stays."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with pytest.raises(KeyboardInterrupt), SearchDisplay(console, is_quiet) as display:
        display.begin(search_start())
        display.trial_changed(running(1))
        display.progress(update(1, 100))
        raise KeyboardInterrupt
    text = written(console)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == (0 if is_quiet else 1)


def test_a_long_reason_takes_one_line_of_a_terminal_and_all_of_a_file() -> None:
    failed = record(state="failed", reason="out of memory: " + 30 * "word ")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with SearchDisplay(terminal) as display:
        display.begin(search_start())
        display.trial_changed(failed)
    plain = Text.from_ansi(written(terminal)).plain
    (line,) = (line for line in plain.splitlines() if "failed     0.500" in line)
    assert line.endswith("…")
    assert "word word" not in plain
    file = plain_console()
    with SearchDisplay(file) as display:
        display.begin(search_start())
        display.trial_changed(failed)
    assert 30 * "word " in written(file).replace("\n", " ")


@pytest.mark.parametrize("width", [80, 200])
def test_the_rows_of_running_trials(width: int) -> None:
    trials = [
        (record(1, state="running"), update(1, 300)),
        (running(2), update(2, 40, "evaluating", rate=0.0)),
        (running(3), None),
        (running(4), None),
        (running(5), None),
    ]
    lines = shown(running_table(trials, "mmstar_accuracy", (100, 300), max_rows=3), width)
    assert all(len(line) <= width for line in lines)
    cells = [line.split() for line in lines]
    head = ["running", "samples", "next", "mmstar_accuracy", "loss", "/s", "left"]
    assert cells[0] == head
    assert [c for c in cells[1] if "━" not in c] == [
        *("trial", "1", "300", "900", "0.500", "[0.472,", "0.528]", "0.712", "30", "20", "s"),
    ]
    assert [c for c in cells[2] if "━" not in c and c != "╸"] == [
        *("trial", "2", "40", "asking", "-", "0.712", "-", "-"),
    ]
    assert cells[3][:3] == ["trial", "3", "starting"]
    assert cells[4] == ["and", "2", "more"]


def test_the_live_part_fits_a_small_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with SearchDisplay(console) as display:
        display.begin(search_start())
        for number in range(60):
            display.trial_changed(running(number))
        display.trial_changed(record(60))
        lines = shown(display._render(), 80)
    assert len(lines) < 24
    assert lines[-2].startswith("best: 0.500 [0.472, 0.528] trial 60   1 in full   0 stopped")
    assert "1 of 16 trials" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_the_bar_of_the_runs_that_confirm() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=24)
    with SearchDisplay(console) as display:
        display.begin(search_start())
        for seed in (1, 2, 3):
            display.trial_changed(running(7, trial_id=f"confirm-7-seed-{seed}", kind=Kind.CONFIRM))
        display.trial_changed(record(7, trial_id="confirm-7-seed-1", kind=Kind.CONFIRM))
        assert "confirming on fresh seeds: 1 of at most 6 runs" in shown(display._render(), 100)[-1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"trials": 20}, (0.25, "5 of 20 trials")),
        ({"trials": 20, "hours": 2.0}, (0.5, "1 of 2 hours")),
        ({"trials": 20, "gpu_hours": 4.0}, (0.75, "3 of 4 GPU-hours")),
        ({"hours": 0.5}, (1.0, "1 of 0.5 hours")),
        ({"target": 0.9}, None),
    ],
)
def test_the_limit_that_comes_first(budget: dict[str, Any], expected: Any) -> None:
    spent = nearest_limit(Budget(**budget), num_ended=5, seconds=3600.0, gpu_hours=3.0)
    assert (spent and (spent.share, spent.text)) == expected
    if spent:
        (line,) = shown(budget_bar(spent, "", 3600.0), 100)
        left = describe_duration(3600 * (1 - spent.share) / spent.share)
        assert line.endswith(f"1:00:00  about {left} left")


def test_nothing_is_known_of_the_end_before_the_first_trial_has_ended() -> None:
    spent = nearest_limit(Budget(trials=4), num_ended=0, seconds=10.0, gpu_hours=0.0)
    assert spent is not None
    (line,) = shown(budget_bar(spent, "", 10.0), 100)
    assert line.rstrip().endswith("0 of 4 trials  10 s")


def test_a_budget_in_words() -> None:
    budget = Budget(trials=16, hours=2.5, gpu_hours=8.0, target=0.9, patience=5)
    assert describe_budget(budget) == (
        "16 trials, 2.5 hours, 8 GPU-hours, a value of 0.9, 5 trials without a new best"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (247, "4:07"),
        (3599.6, "1:00:00"),
        (11047, "3:04:07"),
        (97447, "1 d 3:04 h"),
        (float("inf"), "-"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert describe_duration(seconds) == expected


def test_how_a_search_ends(tmp_path: Path) -> None:
    """The last lines: best, its gain over the default, and the command to run it."""
    objective = Objective(metric="mmstar_accuracy", mode="max")
    default = record(0)
    better = record(1, metrics=METRICS | {"mmstar_accuracy": 0.75})
    console = plain_console()
    summary = summarize(
        "digits",
        [default, better],
        objective,
        wall_seconds=1.0,
        gpus_per_trial=0.0,
        ended_by="budget.trials: 2 trials are done",
    )
    store = ResultsStore(tmp_path / "digits", objective, 0.0)
    with store.opened(resume=False), SearchDisplay(console) as display:
        store.begin()
        display.begin(search_start(store.folder))
        write_answers(store.folder, "trial-0000", [True, False, False, True])
        write_answers(store.folder, "trial-0001", [True, True, False, True])
        store.write_text("report.html", "")
        display.trial_changed(default)
        display.trial_changed(better)
        display.trial_changed(paused(2))
        display.end(summary)
    lines = written(console).splitlines()
    assert "ended: budget.trials: 2 trials are done" in lines
    assert f"report: {store.folder}/report.html" in lines
    assert "1 paused (1 at 100 samples)" in lines
    assert lines[-2].startswith(
        "best: trial 1, mmstar_accuracy 0.750 [0.725, 0.773] (lmms-eval-0.7.1); "
        "25.0 points [-24.0, 74.0] over the default configuration, not confirmed on fresh seeds; "
        "run it again:"
    )
    assert lines[-1] == f"python run_single.py --config {store.folder}/best.yaml"


def write_answers(folder: Path, trial_id: str, correct: list[bool]) -> None:
    (folder / "answers").mkdir(exist_ok=True)
    lines = [
        f'{{"index": {i}, "correct": {str(right).lower()}, "letter": "A", "answer": "A"}}\n'
        for i, right in enumerate(correct)
    ]
    (folder / "answers" / f"{trial_id}.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("speed", "expected"),
    [(SPEED, "(2.0 s, 812 samples/s, data 0.4 %, MFU 41 %)"), (None, "(2.0 s)")],
)
def test_the_line_of_a_single_run_s_report(speed: Speed | None, expected: str) -> None:
    console = plain_console()
    with SingleDisplay(console) as display:
        display.begin(single_start())
        display.trial_changed(record(speed=speed))
        display.trial_changed(record(speed=speed))  # no further report
    accuracy = "mmstar_accuracy 0.500 [0.472, 0.528] (lmms-eval-0.7.1)"  # an earlier version's
    losses = f"100 samples, step 10: train_loss 1.2500, {accuracy}"
    assert written(console).splitlines()[3:] == [f"{losses}  {expected}"]


def test_the_bar_of_a_single_run() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=24)
    with SingleDisplay(console) as display:
        display.begin(single_start())
        display.progress(update(0, 300))
        (line,) = shown(display._progress, 120)
    assert line.startswith("training ")
    assert "300 of 900 samples loss 0.712, 30/s, data 1.6 %" in line


def test_a_terminal_without_a_character_shows_a_question_mark() -> None:
    code = (
        "from nanovlm.watch.terminal.console import make_console\n"
        "make_console().print('0.96 ± 0.01')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert (done.stdout, done.stderr) == ("0.96 ? 0.01\n", "")


@pytest.mark.parametrize(("term", "expected"), [("xterm-256color", True), ("dumb", False)])
def test_a_terminal_that_cannot_go_back_gets_plain_lines(term: str, expected: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": term})
    assert can_redraw(console) == expected
