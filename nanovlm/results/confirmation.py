"""What the confirming runs say: which configuration is best, and whether that is more than chance.

They are a race (`search/confirm.py`), of which this knows the runs alone. Pure functions of the
runs' records and of their answers to the benchmark.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import (
    DEFAULT_NUMBER,
    compare_runs,
    describe_conclusion,
    gain_counts,
    sign_of,
)
from nanovlm.results.pareto import choose
from nanovlm.results.statistics import ANSWER_METRICS, LEVEL, paired_interval, pooled_spread


@dataclass(frozen=True)
class _Configuration:
    """The confirming runs of one configuration."""

    number: int
    finished: Mapping[int, TrialRecord]
    """By their seed, ascending."""
    failed: Sequence[TrialRecord]
    values: Mapping[int, float]
    """The objective of each finished run, by its seed."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def is_infeasible(self) -> bool:
        """Whether a seed has made it fail by its own values."""
        return any(run.is_infeasible for run in self.failed)

    @property
    def last_seed(self) -> int:
        return max([*self.finished, *map(_seed, self.failed)])

    def differences(self, other: "_Configuration") -> dict[int, float]:
        """Return the values less those of `other`, by the seeds that both have finished."""
        return {
            seed: value - other.values[seed]
            for seed, value in self.values.items()
            if seed in other.values
        }


def summarize_confirmation(
    runs: Sequence[TrialRecord],
    searched: Sequence[TrialRecord],
    objective: Objective,
    answers_dir: Path,
) -> dict[str, Any] | None:
    """Return what `summary.json` has under `confirmation`; None without runs.

    The winner is who came furthest in the race, of those the one with the best mean; the default
    configuration if none beats its mean over the seeds that both have. One that a seed has made
    fail by its own values comes after all others. With several objectives the winner is the trial
    that was chosen from their front: it may be behind in the first, for what it gains in others.

    Args:
        runs: the ended confirming runs, each with the number of the trial whose configuration it
            is and a configuration with its seed.
        searched: the ended trials of the search.
        answers_dir: folder with `<trial_id>.jsonl` of the confirming runs.

    Raises:
        UserError: a file of answers is broken, or runs were asked different questions.
    """
    if not runs:
        return None
    numbers = sorted({run.number for run in runs})
    configurations = [_configuration(runs, number, objective.metric) for number in numbers]
    ordered = _ordered(configurations, sign_of(objective))
    if len(objective.all) > 1 and (choice := choose(searched, objective)) is not None:
        ordered.sort(key=lambda c: c.number != choice.record.number)
    default = next((c for c in configurations if c.number == DEFAULT_NUMBER), None)
    search_values = {
        r.number: r.metrics.get(objective.metric) for r in searched if r.state == "completed"
    }
    described = [
        _describe(c, search_values.get(c.number))
        | {
            "difference_to_default": _difference(c, default, objective, answers_dir),
            "race": _race(c, ordered, objective, answers_dir),
        }
        for c in ordered
    ]
    is_held_out = all(run.config.get("mmstar_part") == "holdout" for run in runs)
    spread = pooled_spread([[*c.values.values()] for c in configurations])
    return {
        "winner": None if ordered[0].mean is None else ordered[0].number,
        "gain_counts": gain_counts(described, objective),
        "verdict": describe_conclusion(described, objective, is_held_out),
        "seed_deviation": spread and spread.deviation,
        "seed_degrees_of_freedom": spread and spread.degrees,
        "configurations": described,
    }


def confirmation_and_problems(
    runs: Sequence[TrialRecord],
    searched: Sequence[TrialRecord],
    objective: Objective,
    answers_dir: Path,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what `summarize_confirmation` does, and what is wrong with the files of answers.

    If something is, the runs are compared by their seeds alone.
    """
    lost = [
        run.trial_id
        for run in runs
        if run.state == "completed"
        and objective.metric in ANSWER_METRICS
        and not (answers_dir / f"{run.trial_id}.jsonl").exists()
    ]
    problems = [f"{answers_dir} lacks {', '.join(lost)}: compared by seeds alone"] if lost else []
    try:
        return summarize_confirmation(runs, searched, objective, answers_dir), problems
    except UserError as error:
        problems += [f"{message}: compared by seeds alone" for message in error.messages]
        nowhere = answers_dir / "-"
        return summarize_confirmation(runs, searched, objective, nowhere), problems


def _configuration(runs: Sequence[TrialRecord], number: int, metric: str) -> _Configuration:
    own = [run for run in runs if run.number == number]
    finished = [run for run in own if run.state == "completed" and metric in run.metrics]
    finished.sort(key=_seed)
    return _Configuration(
        number=number,
        finished={_seed(run): run for run in finished},
        failed=[run for run in own if run not in finished],
        values={_seed(run): run.metrics[metric] for run in finished},
    )


def _seed(run: TrialRecord) -> int:
    seed: int = run.config["seed"]
    return seed


def _ordered(configurations: Sequence[_Configuration], sign: int) -> list[_Configuration]:
    """Return the configurations, the best first.

    Candidates that dropped out have fewer seeds and come later, whatever luck their mean had. The
    default one, which never drops out, stands before the first that it is not behind.
    """

    def rank(c: _Configuration) -> tuple[bool, bool, int, float]:
        mean = c.mean
        last_seed = max(c.finished, default=0)
        return mean is None, c.is_infeasible, -last_seed, 0.0 if mean is None else -sign * mean

    candidates = sorted((c for c in configurations if c.number != DEFAULT_NUMBER), key=rank)
    for default in (c for c in configurations if c.number == DEFAULT_NUMBER):
        behind = [default.mean is not None and _is_behind(c, default, sign) for c in candidates]
        candidates.insert([*behind, True].index(True), default)
    return candidates


def _is_behind(this: _Configuration, default: _Configuration, sign: int) -> bool:
    if this.is_infeasible != default.is_infeasible or this.mean is None:
        return this.mean is None or this.is_infeasible
    differences = this.differences(default)
    return bool(differences) and sign * statistics.fmean(differences.values()) <= 0


def _describe(configuration: _Configuration, search_value: float | None) -> dict[str, Any]:
    runs = [*configuration.finished.values(), *configuration.failed]
    values = [*configuration.values.values()]
    is_single = len(values) < 2
    return {
        "number": configuration.number,
        "parameters": dict(runs[0].parameters),
        "mean": configuration.mean,
        "standard_error": None if is_single else statistics.stdev(values) / math.sqrt(len(values)),
        "search_value": search_value,
        "runs": [
            {"trial_id": run.trial_id, "seed": seed, "value": configuration.values[seed]}
            for seed, run in configuration.finished.items()
        ],
        "failed": [
            {"trial_id": run.trial_id, "seed": _seed(run), "reason": run.reason}
            for run in configuration.failed
        ],
    }


def _difference(
    this: _Configuration, default: _Configuration | None, objective: Objective, answers_dir: Path
) -> dict[str, Any] | None:
    """Return this configuration less the default one, over the seeds that both have finished."""
    if default is None or this is default or not (differences := this.differences(default)):
        return None
    ours, theirs = ([side.finished[seed] for seed in differences] for side in (this, default))
    items = compare_runs(ours, theirs, objective.metric, answers_dir)
    return {
        "mean": statistics.fmean(differences.values()),
        "seeds": [*differences],
        "seeds_interval_95": paired_interval([*differences.values()]),
        "interval_95": items and items.interval_95,
        "p_value": items and items.p_value,
        "num_items": items and items.num_items,
        "only_this_right": items and items.only_a,
        "only_default_right": items and items.only_b,
    }


def _race(
    this: _Configuration,
    ordered: Sequence[_Configuration],
    objective: Objective,
    answers_dir: Path,
) -> dict[str, Any] | None:
    """Return how far a candidate came, and what it lacks to the best one; None for the default one.

    It is clearly behind if neither other questions nor other seeds could easily have undone that:
    by the spread that the candidates have in common, for it may have a single seed. The level of
    95 % is for all pairs of candidates together (Bonferroni).
    """
    if this.number == DEFAULT_NUMBER:
        return None
    candidates = [c for c in ordered if c.number != DEFAULT_NUMBER]
    best, spread = candidates[0], pooled_spread([[*c.values.values()] for c in candidates])
    differences = {} if this is best else best.differences(this)
    behind = sign_of(objective) * statistics.fmean(differences.values()) if differences else None
    is_clear = False
    if behind is not None and spread is not None:
        error = (1 - LEVEL) / math.comb(len(candidates), 2)
        half = spread.difference_half_width(len(differences), len(differences), 1 - error)
        ours, theirs = ([side.finished[seed] for seed in differences] for side in (best, this))
        items = compare_runs(ours, theirs, objective.metric, answers_dir)
        is_clear = behind > half and (items is None or items.p_value < error)
    return {
        "last_seed": this.last_seed,
        "is_out": bool(this.failed) or this.last_seed < max(c.last_seed for c in candidates),
        "behind_best": behind,
        "is_clearly_behind": is_clear,
    }
