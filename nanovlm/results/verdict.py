"""The one sentence that a confirmed search ends with, in plain words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.comparison import ANSWER_METRICS, compare_answers, read_answers

DEFAULT_NUMBER = 0
"""Of the trial that runs the base configuration."""

SIGNIFICANT = 0.05

_DEFAULT = "the default configuration"


def describe_verdict(
    configurations: Sequence[Mapping[str, Any]], objective: Objective, is_held_out: bool
) -> str:
    """Return who is best, by how much, and whether that is more than chance (`gain_counts`).

    Args:
        configurations: as in `summary.json`, the best first.
        is_held_out: whether the questions are ones that the search did not ask.
    """
    failed = sum(len(c["failed"]) for c in configurations)
    total = failed + sum(len(c["runs"]) for c in configurations)
    tail = _not_told_apart(configurations, total)
    tail += f"; {failed} of {total} runs failed" if failed else ""
    if len(objective.all) > 1:
        tail += f"; that is of {objective.metric} alone, not of the trade-off"
    return _Sentence(configurations, objective, is_held_out).text() + tail


def gain_counts(configurations: Sequence[Mapping[str, Any]], objective: Objective) -> bool:
    """Return whether the best configuration's gain over the default one is more than chance.

    It counts if neither other questions nor other seeds could easily have undone it: p below 0.05
    where the questions were compared, and an interval over seeds that does not hold 0. One seed has
    no such interval, and does not suffice.

    Args:
        configurations: as in `summary.json`, the best first.
    """
    difference = configurations[0]["difference_to_default"]
    if difference is None or _Unit(objective).gain(difference["mean"]) <= 0:
        return False
    p_value, interval = difference["p_value"], difference["seeds_interval_95"]
    if p_value is not None and p_value >= SIGNIFICANT:
        return False
    return interval is not None and not _holds_zero(interval)


def left_the_race(configuration: Mapping[str, Any], objective: Objective) -> str | None:
    """Return when a configuration dropped out and why; None for one that did not.

    Args:
        configuration: of `configurations` in `summary.json`.
    """
    race = configuration.get("race")  # earlier versions did not write it
    if not race or not race["is_out"]:
        return None
    if configuration["failed"]:
        return f"failed on seed {configuration['failed'][-1]['seed']}"
    text = f"after seed {race['last_seed']}"
    if race["behind_best"] is None:
        return text
    amount = _Unit(objective).amount_of_gain(race["behind_best"])
    return f"{text}: {amount} behind, {'clearly' if race['is_clearly_behind'] else 'or by chance'}"


def describe_unconfirmed_gain(
    best: TrialRecord, records: Sequence[TrialRecord], objective: Objective, answers_dir: Path
) -> str | None:
    """Return what a search's best trial gains over the default one, where no run confirms it.

    None if the default one is the best, or has not run in full.

    Args:
        answers_dir: folder with `<trial_id>.jsonl` of the trials.
    """
    default = next((r for r in records if r.number == DEFAULT_NUMBER), None)
    if default is None or default.state != "completed" or best.number == DEFAULT_NUMBER:
        return None
    gain = best.metrics[objective.metric] - default.metrics[objective.metric]
    interval = interval_by_questions(best, default, objective.metric, answers_dir)
    text = _Unit(objective).amount(gain, interval)
    return f"{text} over {_DEFAULT}, not confirmed on fresh seeds"


def interval_by_questions(
    best: TrialRecord, default: TrialRecord, metric: str, answers_dir: Path
) -> tuple[float, float] | None:
    """Return the 95 % interval of the gain of one trial over another; None if the metric does not
    stand on the answers to single questions, or answers are gone, damaged or to other questions."""
    if metric not in ANSWER_METRICS:
        return None
    files = [answers_dir / f"{record.trial_id}.jsonl" for record in (best, default)]
    try:
        ours, others = (read_answers(file, metric) for file in files)
        return compare_answers([ours], [others]).interval_95
    except (UserError, ValueError):
        return None


class _Unit:
    """Writes differences of the objective as gains: more is better."""

    def __init__(self, objective: Objective) -> None:
        self._sign = 1 if objective.mode == "max" else -1
        self._is_accuracy = "accuracy" in objective.metric
        self._name = "points" if self._is_accuracy else objective.metric

    def gain(self, difference: float) -> float:
        """Return how much better something with this difference is."""
        return self._sign * difference

    def amount(self, difference: float, interval: Sequence[float] | None) -> str:
        """Return `10.9 points [8.9, 12.8]`."""
        text = self.amount_of_gain(self.gain(difference))
        return text if interval is None else f"{text} {self.interval(interval)}"

    def amount_of_gain(self, gain: float) -> str:
        """Return `10.9 points`."""
        return f"{self._number(gain)} {self._name}"

    def interval(self, interval: Sequence[float]) -> str:
        low, high = sorted(map(self.gain, interval))
        return f"[{self._number(low)}, {self._number(high)}]"

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self._is_accuracy else f"{value:.3g}"


class _Sentence:
    def __init__(
        self, configurations: Sequence[Mapping[str, Any]], objective: Objective, is_held_out: bool
    ) -> None:
        self._best = configurations[0]
        self._difference = self._best["difference_to_default"]
        self._counts = gain_counts(configurations, objective)
        self._metric = objective.metric
        self._is_tradeoff = len(objective.all) > 1
        self._unit = _Unit(objective)
        self._questions = "held-out questions" if is_held_out else "questions"

    def text(self) -> str:
        best, difference = self._best, self._difference
        if best["mean"] is None:
            return "no configuration has a finished run on a fresh seed"
        mean = f"mean {self._metric} {best['mean']:.4g} over {_seeds(len(best['runs']))}"
        if best["number"] == DEFAULT_NUMBER:
            return f"{_DEFAULT} is best: {mean}"
        if difference is None:
            return (
                f"trial {best['number']} has the best mean, and {_DEFAULT} has no finished run to "
                f"compare it with: {mean}"
            )
        if difference["p_value"] is None:
            return self._by_seeds()
        return self._by_questions()

    def _by_questions(self) -> str:
        difference, name = self._difference, f"trial {self._best['number']}"
        gain = self._amount(difference["interval_95"])
        where = f"on {difference['num_items']} {self._questions}"
        p = f"p = {difference['p_value']:.2g}"
        interval = difference["seeds_interval_95"]
        if self._counts:
            return f"{name} beats {_DEFAULT} by {gain} {where} ({p})"
        if self._is_loss():
            return f"{name} is behind {_DEFAULT}: its gain of {gain} {where} is no chance ({p})"
        is_behind = self._gain <= 0 and not self._is_tradeoff
        if difference["p_value"] >= SIGNIFICANT or is_behind:
            return f"the gain of {name} over {_DEFAULT}, {gain} {where}, is inside the noise ({p})"
        if interval is None:
            return (
                f"the gain of {name} over {_DEFAULT}, {gain} {where} ({p}), may be noise between "
                "seeds: with one seed that is not known"
            )
        return (
            f"the gain of {name} over {_DEFAULT}, {gain} {where} ({p}), is inside the noise "
            f"between seeds: {self._unit.interval(interval)}"
        )

    def _by_seeds(self) -> str:
        difference, name = self._difference, f"trial {self._best['number']}"
        interval = difference["seeds_interval_95"]
        over = f"over {_seeds(len(difference['seeds']))}, not compared by questions"
        gain = self._amount(interval)
        if interval is None:
            return (
                f"the gain of {name} over {_DEFAULT}, {gain} {over}, may be noise: how far other "
                "seeds would lie apart is not known"
            )
        if self._counts:
            return f"{name} beats {_DEFAULT} by {gain} {over}"
        if self._is_loss():
            return f"{name} is behind {_DEFAULT}: its gain of {gain} {over} is no chance"
        return f"the gain of {name} over {_DEFAULT}, {gain} {over}, is inside the noise"

    def _is_loss(self) -> bool:
        """Return whether more than chance is lost, for what another objective gains."""
        p_value, interval = self._difference["p_value"], self._difference["seeds_interval_95"]
        if not self._is_tradeoff or self._gain >= 0 or interval is None or _holds_zero(interval):
            return False
        return p_value is None or bool(p_value < SIGNIFICANT)

    @property
    def _gain(self) -> float:
        return self._unit.gain(self._difference["mean"])

    def _amount(self, interval: Sequence[float] | None) -> str:
        return self._unit.amount(self._difference["mean"], interval)


def _not_told_apart(configurations: Sequence[Mapping[str, Any]], num_runs: int) -> str:
    """Return which candidates may be as good as the best of them, as the end of a sentence."""
    raced = [c for c in configurations if c.get("race")]  # earlier versions did not write it
    open_ones = [
        c["number"]
        for c in raced
        if c["race"]["behind_best"] is not None and not c["race"]["is_clearly_behind"]
    ]
    if not open_ones:
        return ""
    *some, last = map(str, sorted(open_ones))
    names = f"trials {', '.join(some)} and {last}" if some else f"trial {last}"
    return f"; {num_runs} runs could not tell trial {raced[0]['number']} from {names}"


def _holds_zero(interval: Sequence[float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
