"""The table of the LCBench benchmark: mean regrets, and paired differences to one method."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lcbench_runs import SHOWN, Job, Result

Pairs = Mapping[tuple[str, int], float]
"""Regrets by task and seed."""


class Estimate(NamedTuple):
    """A mean over tasks and seeds."""

    mean: float
    error: float
    """Its standard error; not a number for a single value."""
    size: int

    def show(self, signed: bool = False) -> str:
        mean = f"{self.mean:+.3f}" if signed else f"{self.mean:.3f}"
        return f"{mean} ({self.error:.3f})"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and standard error, None of nothing."""
    if not values:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), error, len(values))


def difference(one: Pairs, other: Pairs) -> Estimate | None:
    """Return how much more regret one has, over the tasks and seeds that both have."""
    return estimate([one[pair] - other[pair] for pair in one if pair in other])


def collect(results: Iterable[Result], jobs: Iterable[Job], rule: str, amount: int) -> Pairs:
    """Return the regrets at an amount of compute of the runs that answer one of the jobs, however
    long they were."""
    wanted = {_without_length(job) for job in jobs}
    return {
        (result.job.task, result.job.seed): result.regrets[rule][amount]
        for result in results
        if _without_length(result.job) in wanted and amount in result.regrets[rule]
    }


def _without_length(job: Job) -> tuple[Any, ...]:
    return (job.method, job.task, job.seed, job.slots, job.noise, job.training_seconds)


def table(
    results: Sequence[Result], jobs: Sequence[Job], rule: str, against: str | None
) -> list[str]:
    """Return the lines of the table of some jobs, which differ in method, task and seed alone."""
    have = {_without_length(result.job) for result in results}
    methods = list(dict.fromkeys(job.method for job in jobs if _without_length(job) in have))
    shown = [amount for amount in SHOWN if amount <= jobs[0].trainings]
    pairs = {
        method: [
            collect(results, [job for job in jobs if job.method == method], rule, amount)
            for amount in shown
        ]
        for method in methods
    }
    lines = [_head("mean regret (standard error)", shown)]
    for method in methods:
        cells = [estimate(list(at.values())) for at in pairs[method]]
        lines.append(_line(method, cells) + _costs(results, jobs, method))
    if against in pairs:
        lines.append(_head(f"less that of {against}, paired", shown))
        for method in methods:
            if method != against:
                both = zip(pairs[method], pairs[against], strict=True)
                cells = [difference(one, other) for one, other in both]
                lines.append(_line(method, cells, signed=True))
    return lines


def _head(title: str, shown: Sequence[int]) -> str:
    return f"{title:<44}{'n':>7}" + "".join(f"{amount:>16}" for amount in shown)


def _line(method: str, cells: Sequence[Estimate | None], signed: bool = False) -> str:
    sizes = sorted({cell.size if cell else 0 for cell in cells})
    n = "-".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    texts = [cell.show(signed) if cell else "-" for cell in cells]
    return f"{method:<44}{n:>7}" + "".join(f"{text:>16}" for text in texts)


def _costs(results: Iterable[Result], jobs: Iterable[Job], method: str) -> str:
    """Return what the longest of a method's runs took, the search's own work apart."""
    wanted = {_without_length(job) for job in jobs if job.method == method}
    those = [result for result in results if _without_length(result.job) in wanted]
    longest = max(result.job.trainings for result in those)
    those = [result for result in those if result.job.trainings == longest]
    own = np.mean([result.search_seconds for result in those])
    trials = np.mean([result.num_trials for result in those])
    full = np.mean([result.num_full for result in those])
    used = np.mean([result.used for result in those])
    return f"   {trials:.0f} trials, {full:.1f} in full; slots busy {used:.0%}; search {own:.1f} s"
