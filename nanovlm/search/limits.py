"""What ends a search before its number of trials: each limit names its figure when it is reached.

A space without a continuous key has so many configurations and no more, and a search that has run
them all is over. Trials are counted by the searcher, and hours by the switch, which wakes up by
itself.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.parameter import count_configurations
from nanovlm.config.search_settings import Budget
from nanovlm.config.space import SearchSpace
from nanovlm.messages import End, TrialRecord
from nanovlm.results.pareto import choose

MAX_FAILURES_IN_A_ROW = 5

MOST_TRIES = 2
"""Of a configuration whose trials fail for no fault of its values."""


class Limits:
    """Throws the switch when a trial's end reaches a limit.

    `budget.patience` counts trials since the best one, in the order of their end: those that ran
    their full budget and are not better, and those that a comparison stopped, or let wait for the
    first time. It begins with the first trial that ran its full budget, for until then there is no
    best to wait for. With several objectives each trial that comes to be on their front is a new
    best. Failed trials say nothing of the values around them and do not count, nor do trials that
    the end of an earlier run stopped.

    Five failed trials in a row end the search. One that is infeasible by its own values (out of
    memory, not finite) counts only while it is in doubt whether anything works: before the first
    report of any trial, and with no trial under way that began before it. Afterwards such trials
    are the edge of the space, which the sampler learns.
    """

    def __init__(self, space: SearchSpace, switch: StopSwitch, logs: Path) -> None:
        """
        Args:
            logs: folder of the workers' logs, named where trials fail.
        """
        self._budget = space.budget
        self._objective = space.objective
        self._switch = switch
        self._logs = logs
        self._gpus = space.resources.gpus_per_trial
        self._seconds: dict[int, float] = {}  # of the work on each trial that ended or is paused
        self._gpu_seconds = 0.0
        self._best: TrialRecord | None = None
        self._front: list[TrialRecord] = []  # of several objectives
        self._trials_since_best = 0
        self._paused: set[int] = set()  # numbers of trials that have paused, and so are counted
        self._failures: list[str] = []  # reasons of the failed trials in a row
        self._under_way: set[int] = set()  # numbers of running trials
        self._has_report = False

    def check(self, record: TrialRecord) -> None:
        """Throw the switch if this change of a trial reaches a limit."""
        self._has_report |= bool(record.reports)
        if record.end is None:
            self._under_way.add(record.number)
        else:
            self._under_way.discard(record.number)
            self._check_failures(record)
        if record.end is not None or record.is_paused:
            self._count(record)

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Count trials that ended before the search was interrupted, in the order of their end.

        Failures in a row start again at none: whoever resumes has put right what failed.
        """
        for record in records:
            self._has_report |= bool(record.reports)
            self._count(record)

    def _count(self, record: TrialRecord) -> None:
        """Count a trial that has ended or paused for the budget."""
        self._check_gpu_hours(record)
        if record.state == "completed":
            self._check_target(record)
        self._check_patience(record)

    def _check_failures(self, record: TrialRecord) -> None:
        may_work = self._has_report or any(n < record.number for n in self._under_way)
        if record.state != "failed":
            self._failures = []
        elif not (record.is_infeasible and may_work):
            self._failures.append(record.reason or "no reason is known")
        if len(self._failures) == MAX_FAILURES_IN_A_ROW:
            others = " (the last one; the others failed otherwise)"
            self._switch.stop(
                f"{MAX_FAILURES_IN_A_ROW} trials in a row failed: {self._failures[-1]}"
                f"{others if len({*self._failures}) > 1 else ''}; see {self._logs}"
            )

    def _check_gpu_hours(self, record: TrialRecord) -> None:
        seconds = record.reports[-1].seconds if record.reports else 0.0
        self._gpu_seconds += self._gpus * (seconds - self._seconds.get(record.number, 0.0))
        self._seconds[record.number] = seconds
        spent, limit = self._gpu_seconds / 3600, self._budget.gpu_hours
        if limit is not None and spent >= limit:
            self._switch.stop(f"budget.gpu_hours: {spent:.4g} GPU-hours of {limit:g} are spent")

    def _check_target(self, record: TrialRecord) -> None:
        target = self._budget.target
        value = record.metrics[self._objective.metric]
        if target is not None and not self._is_better(target, value):
            self._switch.stop(
                f"budget.target: trial {record.number} has {self._objective.metric} {value:.4g}, "
                f"the target is {target:g}"
            )

    def _check_patience(self, record: TrialRecord) -> None:
        patience, metric = self._budget.patience, self._objective.metric
        if record.state == "completed" and self._is_new_best(record):
            self._best, self._trials_since_best = record, 0
        elif record.is_paused or (record.end is not None and record.end.was_compared):
            self._trials_since_best += record.number not in self._paused
        if record.is_paused:
            self._paused.add(record.number)
        if patience is not None and self._best and self._trials_since_best >= patience:
            self._switch.stop(
                f"budget.patience: {self._trials_since_best} trials of {patience} are over "
                f"without a new best since trial {self._best.number} "
                f"({metric} {self._best.metrics[metric]:.4g})"
            )

    def _is_new_best(self, record: TrialRecord) -> bool:
        """Return whether a trial of full length is better than all before; with several objectives:
        whether it is on their front."""
        if len(self._objective.all) == 1:
            metric, best = self._objective.metric, self._best
            return best is None or self._is_better(record.metrics[metric], best.metrics[metric])
        choice = choose([*self._front, record], self._objective)
        self._front = [] if choice is None else [*choice.front]
        return record in self._front

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self._objective.mode == "max" else value < other


def hours_reason(budget: Budget) -> str:
    """Return why a search ends when its hours are over."""
    return f"budget.hours: {budget.hours or 0:g} hours have passed"


class RunConfigurations:
    """Which configurations of a space have run, those that run now included.

    One that has run is not run again: its record is the answer. That is so if it is infeasible, or
    was stopped by a comparison. One whose trial failed otherwise may be tried again (MOST_TRIES),
    and one that the end of an earlier run of the search stopped as often as that happens.
    """

    def __init__(self, space: SearchSpace, records: Iterable[TrialRecord] = ()) -> None:
        """
        Args:
            records: trials that have ended.
        """
        self.num_all = count_configurations(space.parameters)
        self._run = set[frozenset[tuple[str, Any]]]()
        self._failures = Counter[frozenset[tuple[str, Any]]]()
        for record in records:
            if record.state == "failed" and not record.is_infeasible:
                self.fail(record.parameters)
            elif record.end is not None and record.end is not End.SEARCH_ENDED:
                self.begin(record.parameters)

    def has_run(self, values: Mapping[str, Any]) -> bool:
        """Return whether this configuration is not to be run again.

        Args:
            values: of the searched keys that are active.
        """
        return frozenset(values.items()) in self._run

    def begin(self, values: Mapping[str, Any]) -> None:
        """Count a configuration whose trial runs, or has run."""
        self._run.add(frozenset(values.items()))

    def fail(self, values: Mapping[str, Any]) -> None:
        """Count a configuration whose trial failed for no fault of its values."""
        key = frozenset(values.items())
        self._failures[key] += 1
        if self._failures[key] < MOST_TRIES:
            self._run.discard(key)
        else:
            self._run.add(key)

    @property
    def num_left(self) -> int | None:
        """How many have not run; None if there is no end to them."""
        return None if self.num_all is None else self.num_all - len(self._run)

    def reason_to_end(self) -> str | None:
        """Return why no configuration is left to run, None if there are some."""
        if self.num_left != 0:
            return None
        all_of_them = f"all {self.num_all} configurations have"
        what = "its only configuration has" if self.num_all == 1 else all_of_them
        num_failed = sum(number >= MOST_TRIES for number in self._failures.values())
        failed = f", {num_failed} of them failed {MOST_TRIES} times" if num_failed else ""
        return f"the space is used up: {what} run{failed}"
