"""What a search will cost, before anything starts: `run_search.py --dry-run` prints it.

Trials are counted by simulation (`simulation.py`), seconds by a rate that was given or measured,
disk by what is kept (`disk.py`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanovlm.config.parameter import count_configurations
from nanovlm.config.search_settings import TrialResources
from nanovlm.config.space import SearchSpace
from nanovlm.files import free_bytes, gib
from nanovlm.process import usable_cpus
from nanovlm.pruning.pausing_halving import build_rungs
from nanovlm.pruning.simulation import CORRELATIONS, SimulatedSearch, simulate
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.search.confirm import Race, most_batches
from nanovlm.search.disk import DiskPeak, disk_peak, max_paused_states
from nanovlm.search.plan import SearchPlan
from nanovlm.search.throughput_history import ThroughputHistory, past_speed

UNKNOWN_TRIALS = 100
"""Trials of the forecast where nothing known limits their number."""

_MAX_SIMULATED_TRIALS = 4000
"""In all simulated searches together: a second or two."""


@dataclass(frozen=True)
class Rate:
    """How fast one trial trains."""

    samples_per_second: float
    evaluation_seconds: float | None
    """Of one report; None if it was not measured."""
    source: str


@dataclass(frozen=True)
class Range:
    """A mean over simulated searches, and the 5th and 95th of 100 of them."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Range":
        ordered = sorted(values)
        last = len(ordered) - 1
        return Range(
            statistics.fmean(ordered), ordered[round(0.05 * last)], ordered[round(0.95 * last)]
        )

    def times(self, factor: float) -> "Range":
        return Range(self.mean * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{_short(self.mean)} ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True)
class Time:
    """How long a search takes, evaluation included where it was measured."""

    rate: Rate
    trial_seconds: Range
    """Summed over the trials."""
    wall_seconds: Range
    confirm_seconds: float
    """Summed over the runs that confirm."""
    confirm_wall_seconds: float

    def lines(self, resources: TrialResources) -> list[str]:
        """Return what it says in text, counted in the devices that a trial occupies."""
        rate = self.rate
        evaluation = (
            "; evaluation is not counted, its time is unknown"
            if rate.evaluation_seconds is None
            else f", {rate.evaluation_seconds:.3g} s an evaluation"
        )
        name, devices = _device_hours(resources)
        factor = devices / 3600
        return [
            f"rate            {rate.samples_per_second:.4g} samples/s a trial{evaluation} "
            f"({rate.source})",
            f"{name:<15} {self.trial_seconds.times(factor)}, and "
            f"{_short(self.confirm_seconds * factor)} to confirm",
            f"hours           {self.wall_seconds.times(1 / 3600)}, and "
            f"{_short(self.confirm_wall_seconds / 3600)} to confirm",
        ]


@dataclass(frozen=True)
class Pauses:
    """How many trials wait at the milestones, and what becomes of their states."""

    most: Range
    """Trials that wait at a time, at most."""
    max_states: int
    """That are kept of them."""
    states_by: str
    """Why so many."""
    retrained: Range
    """Times that a trial without its state goes on, and trains again from its start."""

    @property
    def num_states(self) -> int:
        """That will be there at a time."""
        return min(self.max_states, math.ceil(self.most.high))

    def line(self) -> str:
        kept = f"the states of at most {self.max_states:,} are kept ({self.states_by})"
        again = f"{self.retrained} times one goes on without and trains again from its start"
        return f"paused          {self.most} trials at a time at most; {kept}; {again}"


@dataclass(frozen=True)
class Forecast:
    """What a search is expected to cost."""

    plan: SearchPlan
    num_trials: int
    trials_by: str
    """Why so many."""
    concurrency: int
    concurrency_by: str
    reached: tuple[Range, ...]
    """Trials that reach each milestone, and last those of full length."""
    search_samples: Range
    pauses: Pauses | None
    """None if trials do not wait at milestones."""
    time: Time | None
    """None where the rate is unknown."""
    confirm_runs: int
    disk: DiskPeak
    free_bytes: int
    left_out: tuple[str, ...] = ()
    """What is damaged in results folders that were asked for the speed."""

    def describe(self) -> str:
        """Return the forecast as lines of text."""
        lines = [
            self.plan.describe(),
            f"trials          {self.num_trials} ({self.trials_by}), {self.concurrency} at once "
            f"({self.concurrency_by})",
            self._configurations_line(),
            *self._trial_lines(),
            *([] if self.pauses is None else [self.pauses.line()]),
            f"search          {self.search_samples} samples",
            self._confirm_line(),
            *self._time_lines(),
            *self._disk_lines(),
            *(f"left out        {text}" for text in self.left_out),
        ]
        return "\n".join(lines)

    def _configurations_line(self) -> str:
        space = self.plan.space
        count, trials = count_configurations(space.parameters), space.budget.trials
        if count is None:
            keys = ", ".join(p.key for p in space.parameters if p.num_values is None)
            return f"configurations  without number, by the ranges of {keys}"
        fewer = trials is not None and count < trials
        ends = f", fewer than budget.trials={trials}: the search ends after them" if fewer else ""
        return f"configurations  {count:,} distinct{ends}"

    def _confirm_line(self) -> str:
        if not self.confirm_runs:
            return "confirm         nothing"
        samples = _short(self.confirm_runs * self.plan.trial_samples)
        raced = len(_race(self.plan.space).candidates)
        best = f"the best {raced} and the default one" if raced > 1 else "the best and the default"
        return (
            f"confirm         at most {self.confirm_runs} full trainings, {samples} samples: {best}"
        )

    def _trial_lines(self) -> list[str]:
        ends = (*self.plan.milestones, self.plan.trial_samples)
        lines = [
            f"  reach {end:>9} {trials}{' in full length' if end == ends[-1] else ''}"
            for end, trials in zip(ends, self.reached, strict=True)
        ]
        if self.plan.milestones:
            lines.append(
                "                if the order of trials at a milestone is mostly that at the end: "
                "simulated, mean (5 % to 95 %)"
            )
        return lines

    def _time_lines(self) -> list[str]:
        if self.time is None:
            return [
                "hours           unknown: give --samples-per-second, or run a search of this model "
                "and data first"
            ]
        lines = self.time.lines(self.plan.space.resources)
        hours = self.plan.space.budget.hours
        if hours is not None and self.time.wall_seconds.mean > hours * 3600:
            lines.append(f"                budget.hours={hours:g} may end the search before that")
        return lines

    def _disk_lines(self) -> list[str]:
        disk = self.disk
        paused = f"of paused trials {gib(disk.paused)}, " if self.pauses else ""
        return [
            f"disk            {gib(disk.total)} at most, {gib(self.free_bytes)} are free: states "
            f"{gib(disk.states)} ({gib(disk.state)} each), {paused}models {gib(disk.models)} "
            f"({gib(disk.model)} each), answers and logs {gib(disk.answers_and_logs)}"
        ]


def forecast(
    plan: SearchPlan,
    concurrency: int | None,
    samples_per_second: float | None,
    results: Path,
) -> Forecast:
    """Return what the search of `plan` will cost.

    Args:
        concurrency: trials at once; None takes what fits on this machine.
        samples_per_second: of one trial; None asks the searches in `results` and `warm_start`.
        results: the folder that results folders are made in.
    """
    space = plan.space
    concurrency_by = "as given" if concurrency else "what fits on this machine"
    concurrency = concurrency or local_slots(space.resources)
    past = past_speed(space, results)
    rate = _rate(past, samples_per_second)
    num_trials, trials_by = _num_trials(plan, concurrency, rate)
    sizes: dict[str, int] = {
        "num_trials": num_trials,
        "concurrency": concurrency,
        "num_questions": plan.data["benchmark"]["samples"],
    }
    max_states = max_paused_states(space, disk_peak(space, **sizes), free_bytes(results))
    searches = _simulate(plan, concurrency, rate, num_trials, max_states)
    pauses = _pauses(space, searches, max_states) if space.scheduler.pauses else None
    confirm_runs, confirm_batches = most_batches(_race(space), concurrency)
    return Forecast(
        plan=plan,
        num_trials=num_trials,
        trials_by=trials_by,
        concurrency=concurrency,
        concurrency_by=concurrency_by,
        reached=tuple(
            Range.of(counts) for counts in zip(*(s.reached for s in searches), strict=True)
        ),
        search_samples=Range.of([s.samples for s in searches]),
        pauses=pauses,
        time=None if rate is None else _time(plan, rate, searches, confirm_runs, confirm_batches),
        confirm_runs=confirm_runs,
        disk=disk_peak(space, **sizes, num_paused=pauses.num_states if pauses else 0),
        free_bytes=free_bytes(results),
        left_out=past.left_out,
    )


def _pauses(space: SearchSpace, searches: Sequence[SimulatedSearch], max_states: int) -> Pauses:
    given = space.scheduler.max_paused
    return Pauses(
        most=Range.of([s.most_paused for s in searches]),
        max_states=max_states,
        states_by="what the disk has room for" if given is None else "scheduler.max_paused",
        retrained=Range.of([s.num_retrained for s in searches]),
    )


def _race(space: SearchSpace) -> Race:
    """Return the race that confirms, with any numbers for the configurations."""
    others = (count_configurations(space.parameters) or math.inf) - 1
    most = space.confirm.top if len(space.objective.all) == 1 else min(space.confirm.top, 1)
    ranked = range(1, int(min(most, others)) + 1)
    return Race.between(ranked, DEFAULT_NUMBER, space.confirm)


def _time(
    plan: SearchPlan,
    rate: Rate,
    searches: Sequence[SimulatedSearch],
    confirm_runs: int,
    confirm_batches: int,
) -> Time:
    run_seconds = _seconds(rate, plan.trial_samples, 1)
    return Time(
        rate,
        trial_seconds=Range.of([_seconds(rate, s.samples, s.num_reports) for s in searches]),
        wall_seconds=Range.of([s.duration / rate.samples_per_second for s in searches]),
        confirm_seconds=confirm_runs * run_seconds,
        confirm_wall_seconds=confirm_batches * run_seconds,
    )


def local_slots(resources: TrialResources) -> int:
    """Return how many trials fit on this machine at once; 1 where not even one does."""
    fits = usable_cpus() / resources.cpus_per_worker
    if resources.gpus_per_worker:
        fits = min(fits, torch.cuda.device_count() / resources.gpus_per_worker)
    return max(1, math.floor(fits) // resources.workers)


def _rate(searches: ThroughputHistory, samples_per_second: float | None) -> Rate | None:
    past = searches.speed
    if samples_per_second is not None:
        source = "as given"
        if past:
            source += "; evaluation as measured in " + _names(past.folders)
        return Rate(samples_per_second, past.evaluation_seconds if past else None, source)
    if past is None:
        return None
    source = "as measured in " + _names(past.folders)
    return Rate(past.samples_per_second, past.evaluation_seconds, source)


def _names(folders: Sequence[Path]) -> str:
    shown = ", ".join(str(folder) for folder in folders[:3])
    return shown if len(folders) <= 3 else f"{shown} and {len(folders) - 3} more"


def _num_trials(plan: SearchPlan, concurrency: int, rate: Rate | None) -> tuple[int, str]:
    """Return how many trials the budget allows, as far as can be known, and by what."""
    budget = plan.space.budget
    options = [(budget.trials, "budget.trials")] if budget.trials is not None else []
    num_configurations = count_configurations(plan.space.parameters)
    if num_configurations is not None:
        options.append((num_configurations, "all configurations of the space"))
    if rate is not None:
        sample = _simulate(plan, concurrency, rate, UNKNOWN_TRIALS)
        seconds = statistics.fmean(_seconds(rate, s.samples, s.num_reports) for s in sample)
        per_trial = seconds / UNKNOWN_TRIALS
        gpus = plan.space.resources.gpus_per_trial
        if budget.hours is not None:
            fits = budget.hours * 3600 * concurrency / per_trial
            options.append((max(1, round(fits)), f"about what fits budget.hours={budget.hours:g}"))
        if budget.gpu_hours is not None and gpus:
            fits = budget.gpu_hours * 3600 / gpus / per_trial
            by = f"about what fits budget.gpu_hours={budget.gpu_hours:g}"
            options.append((max(1, round(fits)), by))
    if options:
        return min(options)
    return UNKNOWN_TRIALS, "an example: how many there will be is not known"


def _simulate(
    plan: SearchPlan,
    concurrency: int,
    rate: Rate | None,
    num_trials: int,
    max_states: int | None = None,
) -> list[SimulatedSearch]:
    """Return simulated searches, as many for each of CORRELATIONS."""
    num_seeds = max(2, min(20, _MAX_SIMULATED_TRIALS // num_trials // len(CORRELATIONS)))
    evaluation_seconds = (rate.evaluation_seconds if rate else None) or 0.0
    # How many go on does not depend on what they are ordered by.
    space = replace(plan.space, objective=plan.space.objective.all[0])
    return [
        simulate(
            build_rungs(space, plan.milestones),
            plan.milestones,
            plan.trial_samples,
            num_trials=num_trials,
            concurrency=concurrency,
            report_cost=evaluation_seconds * rate.samples_per_second if rate else 0.0,
            correlation=correlation,
            most_states=max_states,
            seed=seed,
        )
        for correlation in CORRELATIONS
        for seed in range(num_seeds)
    ]


def _seconds(rate: Rate, samples: float, num_reports: int) -> float:
    """Return how long trials take that train so many samples and report so often."""
    return samples / rate.samples_per_second + num_reports * (rate.evaluation_seconds or 0.0)


def _device_hours(resources: TrialResources) -> tuple[str, float]:
    """Return what is paid for, and how much of it a trial occupies."""
    if resources.gpus_per_worker:
        return "GPU-hours", resources.gpus_per_trial
    return "CPU-hours", resources.workers * resources.cpus_per_worker


def _short(number: float) -> str:
    """Return a number with three digits: `0.125`, `12.5`, `12,500`."""
    if number >= 1000:
        return f"{round(number, 3 - len(str(int(number)))):,.0f}"
    return f"{number:.3g}"
