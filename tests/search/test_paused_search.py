"""Whole searches whose trials pause, on real Ray, with trials that only pretend to train."""

import functools
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.recorder import RunOutcome
from nanovlm.config.space import load_space
from nanovlm.messages import End, TrialRecord
from nanovlm.records import read_record
from nanovlm.results.load import load_results
from nanovlm.results.read import FolderReader, read_records
from nanovlm.search import run as runner
from nanovlm.search.plan import SearchPlan
from nanovlm.search.run import run_plan
from nanovlm.watch.observer import Observer
from tests.results.whole_folders import DATA_MADE
from tests.search.fake_trials import pretend
from tests.worker_threads import worker_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.usefixtures("ray_cluster")]

SPACE = """
preset: digits
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
scheduler: {name: asha, type: pausing, rungs: 3, reduction_factor: 3}
budget: {trials: 10}
confirm: {top: 0}
"""
MILESTONES = (100, 300)


class Interrupter(Observer):
    """Keeps what it is told, and ends the program in order at a pause."""

    def __init__(self, at_pause: int | None = None) -> None:
        self._left = at_pause
        self.records: list[TrialRecord] = []

    def trial_changed(self, record: TrialRecord) -> None:
        self.records.append(record)
        if self._left is not None and record.is_paused:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def only_the_tests_observers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "standard_observers", list)


def run(folder: Path, observer: Observer, resume: bool = False, **changes: Any) -> RunOutcome:
    (folder.parent / "space.yaml").write_text(SPACE)
    concurrency = changes.pop("concurrency", 1)
    plan = SearchPlan(load_space(folder.parent / "space.yaml", changes), MILESTONES, 900, DATA_MADE)
    start_workers = functools.partial(worker_threads, run_trial=pretend)
    return run_plan(
        plan,
        folder,
        resume=resume,
        concurrency=concurrency,
        observers=[observer],
        start_workers=start_workers,
    )


def what_became(folder: Path) -> dict[int, Any]:
    return {
        r.number: (r.end, r.reason, r.parameters, [(p.samples_seen, p.metrics) for p in r.reports])
        for r in read_records(folder)
    }


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_search_whose_trials_pause(tmp_path: Path, concurrency: int) -> None:
    observer = Interrupter()
    outcome = run(tmp_path / "search", observer, concurrency=concurrency)
    assert outcome.summary["ended_by"] == "budget.trials: 10 trials are done"
    records = read_records(outcome.folder)
    assert sorted(record.number for record in records) == list(range(10))
    assert {record.end for record in records} == {End.COMPLETED, End.PRUNED}
    assert outcome.summary["trials"]["paused"] == 0 and not FolderReader(outcome.folder).paused(
        records
    )
    for record in records:
        states = [r.state for r in observer.records if r.number == record.number]
        pauses = Counter(states)["paused"]
        assert states[-1] == record.state and pauses <= 2
        assert len(record.legs) in (pauses, pauses + 1), "a leg for each time that it went on"
    assert any(len(record.legs) > 1 for record in records)
    best = max(records, key=lambda r: r.parameters["lr_mp"])
    assert best.state == "completed", "the values are proportional to the rate"


@pytest.mark.parametrize(("at_pause", "is_killed"), [(1, False), (4, True), (7, False)])
def test_an_interrupted_search_keeps_its_paused_trials(
    tmp_path: Path, at_pause: int, is_killed: bool
) -> None:
    """Also one that was killed between the verdict on a trial and its line in `paused.jsonl`."""
    whole = run(tmp_path / "whole", Interrupter())
    parts = run(tmp_path / "parts", Interrupter(at_pause))
    assert parts.is_interrupted
    paused = load_results(parts.folder).paused
    assert len(paused) == parts.summary["trials"]["paused"] >= 1
    if is_killed:
        path = parts.folder / "paused.jsonl"
        *kept, lost = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept))
        paused = paused[paused["number"] != read_record(lost).number]
    observer = Interrupter()
    assert not run(parts.folder, observer, resume=True).is_interrupted
    taken_up = {record.number for record in observer.records[: len(paused)] if record.is_paused}
    assert taken_up == set(paused["number"])
    assert what_became(parts.folder) == what_became(whole.folder)


def test_an_interrupted_search_does_not_say_that_nothing_is_to_confirm(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"confirm.top": 1}
    outcome = run(tmp_path / "search", Interrupter(1), **changes)
    assert outcome.is_interrupted
    assert outcome.notes == ()


def test_a_search_that_a_limit_ended_promotes_none_of_its_trials(tmp_path: Path) -> None:
    limit: dict[str, Any] = {"budget.target": 1.0}
    first = run(tmp_path / "search", Interrupter(), **limit)
    assert first.summary["ended_by"].startswith("budget.target: ")
    cut_off = {r.number for r in read_records(first.folder) if r.end is End.SEARCH_ENDED}
    assert cut_off, "they were paused"
    more = run(first.folder, Interrupter(), resume=True)
    records = read_records(more.folder)
    assert sorted(record.number for record in records) == list(range(10))
    assert {r.number for r in records if r.end is End.SEARCH_ENDED} == cut_off
