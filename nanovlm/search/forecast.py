"""What a search will cost, before anything starts: `run_search.py --dry-run` prints it.

Trials are counted by simulation (`pruning/simulation.py`), seconds by a rate that was given or
measured in earlier searches, disk by what is kept (`disk.py`).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanovlm.config.parameter import count_configurations
from nanovlm.config.search_settings import TrialResources
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace
from nanovlm.files import free_bytes, gib, user_path
from nanovlm.process import usable_cpus
from nanovlm.pruning.pausing_halving import build_rungs
from nanovlm.pruning.simulation import CORRELATIONS, SimulatedSearch, simulate
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.results.read import SUMMARY_FILE, TRIALS_FILE, FolderReader
from nanovlm.search.confirm import Race, most_batches
from nanovlm.search.disk import disk_peak, image_bytes, max_paused_states
from nanovlm.search.plan import SearchPlan
from nanovlm.training.frozen_features import feature_bytes

UNKNOWN_TRIALS = 100
"""Trials of the forecast where nothing known limits their number."""

_MAX_SIMULATED_TRIALS = 4000
"""In all simulated searches together: a second or two."""

_SAME_WORK = (
    "train_dataset_path", "train_dataset_name", "turns", "max_images_per_example", "compile",
    "cpu_threads", "vlm",
    "test_dataset_path", "more_benchmarks", "mmstar_batch_size", "mmstar_holdout", "mmstar_part",
)  # fmt: skip
"""Keys of the configuration that the time of a sample or of an evaluation depends on, and that all
trials share."""

_NO_WORK = (
    "vlm_checkpoint_path", "vlm_load_backbone_weights", "vit_dropout", "lm_dropout",
    "stall_minutes",
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """How fast one trial trains, all its workers together."""

    samples_per_second: float
    evaluation_seconds: float | None
    """Of one report; None if it was not measured."""
    source: str

    def hours(self, samples: float, num_reports: int) -> float:
        """Return how long trials take that train so many samples and report so often."""
        evaluation = num_reports * (self.evaluation_seconds or 0.0)
        return (samples / self.samples_per_second + evaluation) / 3600


@dataclass(frozen=True)
class Range:
    """A mean over simulated searches, and the 5th and 95th of 100 of them."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> "Range":
        ordered = sorted(values)
        last = len(ordered) - 1
        low, high = ordered[round(0.05 * last)], ordered[round(0.95 * last)]
        return Range(statistics.fmean(ordered), low, high)

    def __str__(self) -> str:
        return f"{_short(self.mean)} ({_short(self.low)} to {_short(self.high)})"


class Forecast:
    """What a search is expected to cost."""

    def __init__(
        self,
        plan: SearchPlan,
        concurrency: int | None,
        samples_per_second: float | None,
        results: Path,
    ) -> None:
        """
        Args:
            concurrency: of trials; None takes what fits on this machine.
            samples_per_second: of one trial; None asks the searches in `results` and `warm_start`.
            results: the folder that results folders are made in.
        """
        space = self._space = plan.space
        self.plan = plan
        self.concurrency = concurrency or local_slots(space.resources)
        self._concurrency_by = "as given" if concurrency else "what fits on this machine"
        self.rate, self._left_out = past_rate(space, results)
        if samples_per_second is not None:
            evaluation, source = None, "given"
            if past := self.rate:
                evaluation, source = past.evaluation_seconds, f"given; evaluation as {past.source}"
            self.rate = Rate(samples_per_second, evaluation, source)
        self.num_trials, self.trials_by = self._num_trials()
        sizes: dict[str, int] = {
            "num_trials": self.num_trials,
            "concurrency": self.concurrency,
            "num_questions": plan.data["benchmark"]["samples"],
        }
        self._free_bytes = free_bytes(results)
        self._max_states = max_paused_states(space, disk_peak(space, **sizes), self._free_bytes)
        self.searches = self._simulate(self.num_trials, self._max_states)
        most_paused = self.over_searches(lambda s: s.most_paused).high
        num_paused = min(self._max_states, math.ceil(most_paused))
        self.disk = disk_peak(space, **sizes, num_paused=num_paused)
        # The race that confirms, with any numbers for the configurations.
        others = (count_configurations(space.parameters) or math.inf) - 1
        most = space.confirm.top if len(space.objective.all) == 1 else min(space.confirm.top, 1)
        ranked = range(1, int(min(most, others)) + 1)
        race = Race.between(ranked, DEFAULT_NUMBER, space.confirm)
        self._num_raced = len(race.candidates)
        self.confirm_runs, self.confirm_batches = most_batches(race, self.concurrency)

    def over_searches(self, count: Callable[[SimulatedSearch], float]) -> Range:
        return Range.of(map(count, self.searches))

    def _num_trials(self) -> tuple[int, str]:
        """Return how many trials the budget allows, as far as can be known, and by what."""
        budget = self._space.budget
        options = [(budget.trials, "budget.trials")] if budget.trials is not None else []
        num_configurations = count_configurations(self._space.parameters)
        if num_configurations is not None:
            options.append((num_configurations, "all configurations of the space"))
        if rate := self.rate:
            sample = self._simulate(UNKNOWN_TRIALS)
            hours = statistics.fmean(rate.hours(s.samples, s.num_reports) for s in sample)
            gpus = self._space.resources.gpus_per_trial
            for name, limit, in_parallel in (
                ("hours", budget.hours, self.concurrency),
                ("gpu_hours", budget.gpu_hours if gpus else None, 1 / (gpus or 1)),
            ):
                if limit is not None:
                    fits = max(1, round(limit * in_parallel * UNKNOWN_TRIALS / hours))
                    options.append((fits, f"about what fits budget.{name}={limit:g}"))
        if options:
            return min(options)
        return UNKNOWN_TRIALS, "an example: how many there will be is not known"

    def _simulate(self, num_trials: int, max_states: int | None = None) -> list[SimulatedSearch]:
        """Return simulated searches, as many for each of CORRELATIONS."""
        num_seeds = max(2, min(20, _MAX_SIMULATED_TRIALS // num_trials // len(CORRELATIONS)))
        report_cost = 0.0  # in the time of a sample
        if self.rate:
            report_cost = (self.rate.evaluation_seconds or 0.0) * self.rate.samples_per_second
        # How many go on does not depend on what they are ordered by.
        space = replace(self._space, objective=self._space.objective.all[0])
        milestones = self.plan.milestones
        return [
            simulate(
                build_rungs(space, milestones),
                milestones,
                self.plan.trial_samples,
                num_trials=num_trials,
                concurrency=self.concurrency,
                report_cost=report_cost,
                correlation=correlation,
                most_states=max_states,
                seed=seed,
            )
            for correlation in CORRELATIONS
            for seed in range(num_seeds)
        ]

    def describe(self) -> str:
        """Return the forecast as lines of text."""
        lines = [
            self.plan.describe(),
            f"trials          {self.num_trials} ({self.trials_by}), {self.concurrency} at once "
            f"({self._concurrency_by})",
            f"configurations  {self._describe_configurations()}",
            *self._trial_lines(),
            f"search          {self.over_searches(lambda s: s.samples)} samples",
            f"confirm         {self._describe_confirmation()}",
            *self._time_lines(),
            f"disk            {self._describe_disk()}",
            f"prepared        {self._describe_prepared()}",
            *(f"left out        {text}" for text in self._left_out),
        ]
        return "\n".join(lines)

    def _describe_configurations(self) -> str:
        parameters, trials = self._space.parameters, self._space.budget.trials
        count = count_configurations(parameters)
        if count is None:
            keys = ", ".join(p.key for p in parameters if p.num_values is None)
            return f"without number, by the ranges of {keys}"
        fewer = trials is not None and count < trials
        ends = f", fewer than budget.trials={trials}: the search ends after them" if fewer else ""
        return f"{count:,} distinct{ends}"

    def _trial_lines(self) -> Iterator[str]:
        scheduler, indent = self._space.scheduler, " " * 16
        reached = list(map(Range.of, zip(*(s.reached for s in self.searches), strict=True)))
        for milestone, trials in zip(self.plan.milestones, reached, strict=False):
            yield f"  reach {milestone:>9} {trials}"
        yield f"  reach {self.plan.trial_samples:>9} {reached[-1]} in full length"
        if self.plan.milestones:
            order = "if the order of trials at a milestone is mostly that at the end"
            yield f"{indent}{order}: simulated, mean (5 % to 95 %)"
        if scheduler.pauses:
            is_given = scheduler.max_paused is not None
            by = "scheduler.max_paused" if is_given else "what the disk has room for"
            yield (
                f"paused          {self.over_searches(lambda s: s.most_paused)} trials at a time "
                f"at most; the states of at most {self._max_states:,} are kept ({by}); "
                f"{self.over_searches(lambda s: s.num_retrained)} times one goes on without and "
                "trains again from its start"
            )

    def _describe_confirmation(self) -> str:
        if not self.confirm_runs:
            return "nothing"
        samples = _short(self.confirm_runs * self.plan.trial_samples)
        raced = self._num_raced
        best = f"the best {raced} and the default one" if raced > 1 else "the best and the default"
        return f"at most {self.confirm_runs} full trainings, {samples} samples: {best}"

    def _time_lines(self) -> list[str]:
        rate, space = self.rate, self._space
        if rate is None:
            how = "give --samples-per-second, or run a search of this model and data first"
            return [f"hours           unknown: {how}"]
        evaluation = "; evaluation is not counted, its time is unknown"
        if rate.evaluation_seconds is not None:
            evaluation = f", {rate.evaluation_seconds:.3g} s an evaluation"
        resources = space.resources
        name, devices = "CPU-hours", resources.workers * resources.cpus_per_worker
        if resources.gpus_per_worker:
            name, devices = "GPU-hours", resources.gpus_per_trial
        paid = self.over_searches(lambda s: rate.hours(s.samples, s.num_reports) * devices)
        hours = self.over_searches(lambda s: rate.hours(s.duration, 0))
        run_hours = rate.hours(self.plan.trial_samples, 1)
        lines = [
            f"rate            {rate.samples_per_second:.4g} samples/s a trial{evaluation} "
            f"(as {rate.source})",
            f"{name:<15} {paid}, and {_short(self.confirm_runs * run_hours * devices)} to confirm",
            f"hours           {hours}, and {_short(self.confirm_batches * run_hours)} to confirm",
        ]
        limit = space.budget.hours
        if limit is not None and hours.mean > limit:
            lines.append(f"{' ' * 16}budget.hours={limit:g} may end the search before that")
        return lines

    def _describe_disk(self) -> str:
        disk, pauses = self.disk, self._space.scheduler.pauses
        paused = f"of paused trials {gib(disk.paused)}, " if pauses else ""
        return (
            f"{gib(disk.total)} at most, {gib(self._free_bytes)} are free: states "
            f"{gib(disk.states)} ({gib(disk.state)} each), {paused}models {gib(disk.models)} "
            f"({gib(disk.model)} each), answers and logs {gib(disk.answers_and_logs)}"
        )

    def _describe_prepared(self) -> str:
        """Return what the images take, which are prepared by now: nothing here is estimated."""
        vlm, data = self._space.base.vlm, self.plan.data
        what = "tiles" if vlm.traits.is_tiled else "images"
        train, benchmark = (data[part]["images"] for part in ("training", "benchmark"))
        num_bytes = gib((train + benchmark) * image_bytes(vlm))
        text = (
            f"{train:,} {what} to train on and {benchmark:,} of the benchmark take {num_bytes}, "
            "once for all searches"
        )
        if not self._space.base.cache_vision_features:
            return text
        on_gpu = bool(self._space.resources.gpus_per_worker)
        features = gib((train + benchmark) * feature_bytes(vlm, on_gpu))
        return f"{text}; the output of each frozen vision encoder takes {features}"


def local_slots(resources: TrialResources) -> int:
    """Return how many concurrent trials fit on this machine; 1 where not even one does."""
    fits = usable_cpus() / resources.cpus_per_worker
    if resources.gpus_per_worker:
        fits = min(fits, torch.cuda.device_count() / resources.gpus_per_worker)
    return max(1, math.floor(fits) // resources.workers)


def _short(number: float) -> str:
    """Return a number with three digits: `0.125`, `12.5`, `12,500`."""
    if number >= 1000:
        return f"{round(number, 3 - len(str(int(number)))):,.0f}"
    return f"{number:.3g}"


def past_rate(space: SearchSpace, results: Path) -> tuple[Rate | None, list[str]]:
    """Return how fast such trials were in the folders of `results` and of `warm_start`, and what is
    damaged there.

    A folder counts if its space has the same model, data, benchmark, settings of execution and
    resources of a trial. Which GPU it was, no results folder says: the caller names the folders.
    """
    measured, folders, damaged = list[tuple[float, float]](), list[str](), list[str]()
    folders_to_ask = [*map(user_path, space.warm_start), *sorted(results.glob("*/"))]
    for folder in dict.fromkeys(folder.resolve() for folder in folders_to_ask):
        reader = FolderReader(folder)
        if not reader.has(TRIALS_FILE, SUMMARY_FILE):
            continue
        there = reader.space(())
        records, _ = reader.ended() if there and _work(there) == _work(space) else ([], [])
        damaged += reader.problems if there else reader.problems or reader.notes
        found = [
            (report.speed.samples_per_second, report.evaluation_seconds)
            for record in records
            for report in record.reports
            if report.speed and not reader.problems
        ]
        measured += found
        folders += [str(folder)] if found else []
    if not measured:
        return None, damaged
    samples_per_second, evaluation_seconds = map(statistics.median, zip(*measured, strict=True))
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    source = f"measured in {', '.join(folders[:3])}{more}"
    return Rate(samples_per_second, evaluation_seconds, source), damaged


def _work(space: SearchSpace) -> dict[str, Any]:
    """Return what the time of a trial's samples and evaluations depends on."""
    config = config_values(space.base)
    work = {key: _plain(config[key]) for key in _SAME_WORK}
    return work | {"resources": _plain(space.resources.model_dump())}


def _plain(value: Any) -> Any:
    """Return a value of a configuration without what makes no work, and lists for tuples."""
    if isinstance(value, str):
        return value.partition("@")[0]  # a version of the same data set
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items() if key not in _NO_WORK}
    return list(value) if isinstance(value, tuple) else value
