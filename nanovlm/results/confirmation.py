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
from nanovlm.results.comparison import (
    ANSWER_METRICS,
    LEVEL,
    PairedComparison,
    compare_answers,
    paired_interval,
    pooled_spread,
    read_answers,
)
from nanovlm.results.pareto import Choice, choose
from nanovlm.results.verdict import DEFAULT_NUMBER, describe_verdict, gain_counts


@dataclass(frozen=True)
class _Configuration:
    """The confirming runs of one configuration."""

    number: int
    finished: Mapping[int, TrialRecord]
    """By their seed."""
    failed: Sequence[TrialRecord]
    metric: str

    @property
    def values(self) -> dict[int, float]:
        """The objective of each finished run, by its seed."""
        return {seed: run.metrics[self.metric] for seed, run in self.finished.items()}

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.finished else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean, from the spread of this configuration's own seeds."""
        if len(self.finished) < 2:
            return None
        return statistics.stdev(self.values.values()) / math.sqrt(len(self.finished))

    @property
    def is_infeasible(self) -> bool:
        """Whether a seed has made it fail by its own values."""
        return any(run.is_infeasible for run in self.failed)


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
    metric = objective.metric
    sign = 1 if objective.mode == "max" else -1
    numbers = sorted({run.number for run in runs})
    configurations = {number: _configuration(runs, number, metric) for number in numbers}
    spread = pooled_spread([[*c.values.values()] for c in configurations.values()])
    default = configurations.get(DEFAULT_NUMBER)
    search_values = {r.number: r.metrics.get(metric) for r in searched if r.state == "completed"}
    ordered = _ordered(configurations, sign)
    if len(objective.all) > 1:
        ordered = _chosen_first(ordered, choose(searched, objective))
    described = [
        _describe(c, search_values.get(c.number))
        | {
            "difference_to_default": _difference(c, default, answers_dir),
            "race": _race(c, ordered, sign, answers_dir),
        }
        for c in ordered
    ]
    return {
        "winner": None if ordered[0].mean is None else ordered[0].number,
        "gain_counts": gain_counts(described, objective),
        "verdict": describe_verdict(described, objective, _is_held_out(runs)),
        "seed_deviation": spread and spread.deviation,
        "seed_degrees_of_freedom": spread and spread.degrees,
        "configurations": described,
    }


def confirmation_by_what_is_left(
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
    return _Configuration(
        number=number,
        finished={_seed(run): run for run in sorted(finished, key=_seed)},
        failed=[run for run in own if run not in finished],
        metric=metric,
    )


def _seed(run: TrialRecord) -> int:
    seed: int = run.config["seed"]
    return seed


def _ordered(configurations: Mapping[int, _Configuration], sign: int) -> list[_Configuration]:
    """Return the configurations, the best first.

    Candidates that dropped out have fewer seeds and come later, whatever luck their mean had. The
    default one, which never drops out, stands before the first that it is not behind.
    """

    def rank(c: _Configuration) -> tuple[bool, bool, int, float]:
        mean = c.mean
        last_seed = max(c.finished, default=0)
        return mean is None, c.is_infeasible, -last_seed, 0.0 if mean is None else -sign * mean

    default = configurations.get(DEFAULT_NUMBER)
    ordered = sorted((c for c in configurations.values() if c is not default), key=rank)
    if default is None:
        return ordered
    place = len(ordered)
    if default.mean is not None:
        behind = (i for i, c in enumerate(ordered) if _is_behind(c, default, sign))
        place = next(behind, place)
    return [*ordered[:place], default, *ordered[place:]]


def _chosen_first(ordered: Sequence[_Configuration], choice: Choice | None) -> list[_Configuration]:
    """Return the configurations with that of the chosen trial first, if it has run."""
    chosen = None if choice is None else choice.record.number
    return sorted(ordered, key=lambda c: c.number != chosen)


def _is_behind(this: _Configuration, default: _Configuration, sign: int) -> bool:
    if this.is_infeasible != default.is_infeasible or this.mean is None:
        return this.mean is None or this.is_infeasible
    difference = _mean_difference(this, default)
    return difference is not None and sign * difference <= 0


def _mean_difference(this: _Configuration, other: _Configuration) -> float | None:
    """Return the mean of `this` less that of `other`, over the seeds that both have finished."""
    seeds = this.finished.keys() & other.finished.keys()
    if not seeds:
        return None
    return statistics.fmean(this.values[seed] - other.values[seed] for seed in sorted(seeds))


def _is_held_out(runs: Sequence[TrialRecord]) -> bool:
    return all(run.config.get("mmstar_part") == "holdout" for run in runs)


def _describe(configuration: _Configuration, search_value: float | None) -> dict[str, Any]:
    runs = [*configuration.finished.values(), *configuration.failed]
    return {
        "number": configuration.number,
        "parameters": dict(runs[0].parameters),
        "mean": configuration.mean,
        "standard_error": configuration.standard_error,
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
    this: _Configuration, default: _Configuration | None, answers_dir: Path
) -> dict[str, Any] | None:
    """Return this configuration less the default one, over the seeds that both have finished."""
    if default is None or this is default:
        return None
    mean = _mean_difference(this, default)
    if mean is None:
        return None
    seeds = sorted(this.finished.keys() & default.finished.keys())
    items = _compare_items(this, default, seeds, answers_dir)
    return {
        "mean": mean,
        "seeds": seeds,
        "seeds_interval_95": paired_interval(
            [this.values[seed] - default.values[seed] for seed in seeds]
        ),
        "interval_95": items and items.interval_95,
        "p_value": items and items.p_value,
        "num_items": items and items.num_items,
        "only_this_right": items and items.only_a,
        "only_default_right": items and items.only_b,
    }


def _race(
    this: _Configuration,
    ordered: Sequence[_Configuration],
    sign: int,
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
    ended = {c.number: max([*c.finished, *map(_seed, c.failed)]) for c in candidates}
    best = candidates[0]
    spread = pooled_spread([[*c.values.values()] for c in candidates])
    difference = None if this is best else _mean_difference(best, this)
    is_clear = False
    if difference is not None and spread is not None:
        seeds = sorted(this.finished.keys() & best.finished.keys())
        error = (1 - LEVEL) / math.comb(len(candidates), 2)
        half = spread.difference_half_width(len(seeds), len(seeds), 1 - error)
        items = _compare_items(best, this, seeds, answers_dir)
        is_clear = sign * difference > half and (items is None or items.p_value < error)
    return {
        "last_seed": ended[this.number],
        "is_out": bool(this.failed) or ended[this.number] < max(ended.values()),
        "behind_best": None if difference is None else sign * difference,
        "is_clearly_behind": is_clear,
    }


def _compare_items(
    this: _Configuration, default: _Configuration, seeds: Sequence[int], answers_dir: Path
) -> PairedComparison | None:
    """Return the comparison by questions; None if the metric does not stand on the answers to
    single questions, or answers are gone."""
    if this.metric not in ANSWER_METRICS:
        return None
    files = [
        [answers_dir / f"{side.finished[seed].trial_id}.jsonl" for seed in seeds]
        for side in (this, default)
    ]
    if not all(file.exists() for side in files for file in side):
        return None
    ours, others = ([read_answers(file, this.metric) for file in side] for side in files)
    try:
        return compare_answers(ours, others)
    except ValueError as error:
        names = ", ".join(file.name for side in files for file in side)
        raise UserError(f"{answers_dir}: {names}: {error}") from None
