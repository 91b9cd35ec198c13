"""Decisions are answered in their order, and only when they are safe on the disk."""

import errno
import itertools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanovlm.files import append
from nanovlm.results.decisions import PruningDecision, decision_line
from nanovlm.search.commits import DecisionCommits
from tests.processes import wait_until


class Disk:
    """A log whose syncs are seen, may be held up, and may fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = folder / "rungs.jsonl"
        self.safe: list[int] = []  # numbers of the trials whose lines survive a power loss
        self.answered: list[list[int]] = []
        self.failures: list[Exception] = []
        self.sync_has_begun, self.may_sync = threading.Event(), threading.Event()
        self.may_sync.set()
        self.is_full = False
        monkeypatch.setattr(os, "fsync", self._fsync)

    def commits(self) -> DecisionCommits:
        return DecisionCommits(self.log, self._answer, self.failures.append)

    def decide(self, commits: DecisionCommits, number: int) -> None:
        decision = PruningDecision(number, 100, 104, 0.5, True, "")
        append(self.log, decision_line(decision), is_synced=False)
        commits.put(decision)

    def numbers(self) -> list[int]:
        return [json.loads(line)["number"] for line in self.log.read_text().splitlines()]

    def _fsync(self, file: int) -> None:
        written = self.numbers()
        self.sync_has_begun.set()
        assert self.may_sync.wait(10)
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.safe = written

    def _answer(self, decisions: Sequence[PruningDecision]) -> None:
        numbers = [decision.number for decision in decisions]
        assert set(numbers) <= set(self.safe), "answered before the sync"
        self.answered.append(numbers)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


def test_decisions_that_come_during_a_sync_share_the_next(disk: Disk) -> None:
    with disk.commits() as commits:
        disk.may_sync.clear()
        disk.decide(commits, 0)
        assert disk.sync_has_begun.wait(10)
        for number in range(1, 5):
            disk.decide(commits, number)
        assert disk.answered == []
        disk.may_sync.set()
    assert disk.answered == [[0], [1, 2, 3, 4]] and not disk.failures


def test_all_are_answered_at_the_end(disk: Disk) -> None:
    with disk.commits() as commits:
        for number in range(100):
            disk.decide(commits, number)
    assert [*itertools.chain(*disk.answered)] == list(range(100))


def test_what_cannot_be_made_safe_is_not_answered_and_leaves_no_line(disk: Disk) -> None:
    with disk.commits() as commits:
        disk.decide(commits, 0)
        assert wait_until(lambda: bool(disk.answered), seconds=10)
        disk.is_full = True
        disk.decide(commits, 1)
    assert disk.answered == [[0]] and disk.numbers() == [0]
    (failure,) = disk.failures
    assert isinstance(failure, OSError) and failure.errno == errno.ENOSPC


def test_an_answer_that_fails_is_told(disk: Disk) -> None:
    def fail(decisions: Sequence[PruningDecision]) -> None:
        raise RuntimeError("nobody is there")

    with DecisionCommits(disk.log, fail, disk.failures.append) as commits:
        disk.decide(commits, 0)
    assert [str(failure) for failure in disk.failures] == ["nobody is there"]
