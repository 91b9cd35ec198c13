"""The one sentence that a confirmed search ends with: who is best, and whether that is chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.read import read_answers
from nanovlm.results.statistics import ANSWER_METRICS, PairedComparison, compare_answers

DEFAULT_NUMBER = 0
"""Of the trial that runs the base configuration."""

SIGNIFICANT = 0.05

_DEFAULT = "the default configuration"


def describe_conclusion(
    configurations: Sequence[Mapping[str, Any]], objective: Objective, is_held_out: bool
) -> str:
    """Return who is best, by how much, and whether that is more than chance (`gain_counts`).

    Args:
        configurations: as in `summary.json`, the best first.
        is_held_out: whether the questions are ones that the search did not ask.
    """
    best, difference = configurations[0], configurations[0]["difference_to_default"]
    mean = f"mean {objective.metric} {best['mean'] or 0:.4g} over {_seeds(len(best['runs']))}"
    if best["mean"] is None:
        text = "no configuration has a finished run on a fresh seed"
    elif best["number"] == DEFAULT_NUMBER:
        text = f"{_DEFAULT} is best: {mean}"
    elif difference is None:
        text = (
            f"trial {best['number']} has the best mean, and {_DEFAULT} has no finished run to "
            f"compare it with: {mean}"
        )
    else:
        text = _describe_difference(f"trial {best['number']}", difference, objective, is_held_out)
    failed = sum(len(c["failed"]) for c in configurations)
    total = failed + sum(len(c["runs"]) for c in configurations)
    text += _not_told_apart(configurations, total)
    text += f"; {failed} of {total} runs failed" if failed else ""
    if len(objective.all) > 1:
        text += f"; that is of {objective.metric} alone, not of the trade-off"
    return text


def gain_counts(configurations: Sequence[Mapping[str, Any]], objective: Objective) -> bool:
    """Return whether the best configuration's gain over the default one is more than chance.

    It counts if neither other questions nor other seeds could easily have undone it: p below 0.05
    where the questions were compared, and an interval over seeds that does not hold 0. One seed has
    no such interval, and does not suffice.

    Args:
        configurations: as in `summary.json`, the best first.
    """
    difference = configurations[0]["difference_to_default"]
    if difference is None or sign_of(objective) * difference["mean"] <= 0:
        return False
    return _is_no_chance(difference)


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
    amount = _gain(objective, sign_of(objective) * race["behind_best"])
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
    difference = best.metrics[objective.metric] - default.metrics[objective.metric]
    interval = interval_by_questions(best, default, objective.metric, answers_dir)
    return f"{_gain(objective, difference, interval)} over {_DEFAULT}, not confirmed on fresh seeds"


def interval_by_questions(
    best: TrialRecord, default: TrialRecord, metric: str, answers_dir: Path
) -> tuple[float, float] | None:
    """Return the 95 % interval of the gain of one trial over another; None if the metric does not
    stand on the answers to single questions, or answers are gone, damaged or to other questions."""
    try:
        items = compare_runs([best], [default], metric, answers_dir)
    except UserError:
        return None
    return None if items is None else items.interval_95


def compare_runs(
    ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord], metric: str, answers_dir: Path
) -> PairedComparison | None:
    """Return the comparison of runs by their questions, one run for each seed on either side.

    None if the metric does not stand on the answers to single questions, or answers are gone.

    Raises:
        UserError: a file of answers is damaged, or the questions are not the same.
    """
    files = [[answers_dir / f"{r.trial_id}.jsonl" for r in side] for side in (ours, theirs)]
    if metric not in ANSWER_METRICS or not all(file.exists() for side in files for file in side):
        return None
    a, b = ([read_answers(file, metric) for file in side] for side in files)
    try:
        return compare_answers(a, b)
    except ValueError as error:
        names = ", ".join(file.name for side in files for file in side)
        raise UserError(f"{answers_dir}: {names}: {error}") from None


def sign_of(objective: Objective) -> int:
    """Return what makes a gain of a difference of the first objective: more is better."""
    return 1 if objective.mode == "max" else -1


def _describe_difference(
    name: str, difference: Mapping[str, Any], objective: Objective, is_held_out: bool
) -> str:
    """Return what the difference of the best configuration to the default one shows."""
    p_value, by_seeds = difference["p_value"], difference["seeds_interval_95"]
    by_questions, is_tradeoff = p_value is not None, len(objective.all) > 1
    interval = difference["interval_95"] if by_questions else by_seeds
    amount = _gain(objective, difference["mean"], interval)
    if by_questions:
        questions = "held-out questions" if is_held_out else "questions"
        where, p = f"on {difference['num_items']} {questions}", f" (p = {p_value:.2g})"
    else:
        where, p = f"over {_seeds(len(difference['seeds']))}, not compared by questions", ""
    gained = sign_of(objective) * difference["mean"]
    if gained > 0 and _is_no_chance(difference):
        return f"{name} beats {_DEFAULT} by {amount} {where}{p}"
    if gained < 0 and is_tradeoff and _is_no_chance(difference):
        return f"{name} is behind {_DEFAULT}: its gain of {amount} {where} is no chance{p}"
    gain = f"the gain of {name} over {_DEFAULT}, {amount} {where}"
    if by_questions and (p_value >= SIGNIFICANT or (gained <= 0 and not is_tradeoff)):
        return f"{gain}, is inside the noise{p}"
    if by_seeds is None and by_questions:
        return f"{gain}{p}, may be noise between seeds: with one seed that is not known"
    if by_seeds is None:
        return f"{gain}, may be noise: how far other seeds would lie apart is not known"
    between = f" between seeds: {_interval(objective, by_seeds)}" if by_questions else ""
    return f"{gain}{p}, is inside the noise{between}"


def _is_no_chance(difference: Mapping[str, Any]) -> bool:
    """Return whether neither other questions nor other seeds could easily undo a difference."""
    p_value, interval = difference["p_value"], difference["seeds_interval_95"]
    if interval is None or interval[0] <= 0 <= interval[1]:
        return False
    return p_value is None or bool(p_value < SIGNIFICANT)


def _gain(objective: Objective, difference: float, interval: Sequence[float] | None = None) -> str:
    """Return a difference as a gain, more is better: `10.9 points [8.9, 12.8]`."""
    unit = "points" if "accuracy" in objective.metric else objective.metric
    text = f"{_number(objective, sign_of(objective) * difference)} {unit}"
    return text if interval is None else f"{text} {_interval(objective, interval)}"


def _interval(objective: Objective, interval: Sequence[float]) -> str:
    low, high = sorted(sign_of(objective) * end for end in interval)
    return f"[{_number(objective, low)}, {_number(objective, high)}]"


def _number(objective: Objective, gain: float) -> str:
    return f"{100 * gain:.1f}" if "accuracy" in objective.metric else f"{gain:.3g}"


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


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
