"""The numbers at the head of the report: what was found, how sure it is, what it took."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.results.conclusion import DEFAULT_NUMBER, gain_counts, interval_by_questions
from nanovlm.results.pareto import values_of
from nanovlm.results.read import ANSWERS_DIR
from nanovlm.results.statistics import NUM_ITEMS, interval_95
from nanovlm.results.summary import mmstar_rules
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import (
    NOTHING,
    count,
    difference,
    difference_interval,
    duration,
    metric_interval,
    metric_value,
    run_name,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A number that stands out, with what it means."""

    title: str
    value: str
    detail: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class BestValue:
    """A searched key at its best, and where it was."""

    key: str
    best: str
    default: str


def best_card(search: SearchFolder) -> Card:
    """Return the best value of the objective with its interval."""
    title = f"Best {search.metric}" if search.is_search else search.metric
    if search.is_tradeoff:
        title = f"Chosen, {search.metric}"
    best, metric = search.best, search.metric
    if best is None:
        return Card(title=title, value=NOTHING, detail="no trial has run its full budget yet")
    interval = metric_interval(interval_95(best.metrics, metric), metric)
    notes = [run_name(best) if search.is_search else f"{count(best.samples_seen)} samples"]
    if NUM_ITEMS in best.metrics:
        notes[0] += f", {count(best.metrics[NUM_ITEMS])} questions"
    if metric.startswith("mmstar_accuracy"):
        notes.append(f"scored by {mmstar_rules(best.config)}")
    if search.is_tradeoff and (values := values_of(search.objective, best)):
        others = zip(search.objective.all[1:], values[1:], strict=True)
        notes += [f"{each.metric} {metric_value(value, each.metric)}" for each, value in others]
    winner = _winner(search)
    if winner is not None and winner["mean"] is not None and len(winner["runs"]) > 1:
        seeds = f"mean of {len(winner['runs'])} fresh seeds {metric_value(winner['mean'], metric)}"
        notes.append(seeds)
    if winner is not None and winner["search_value"] is not None:
        notes.append(f"{metric_value(winner['search_value'], metric)} in the search")
    return Card(
        title=title,
        value=metric_value(best.metrics.get(metric), metric),
        detail=f"95 % interval {interval}" if interval else "",
        notes=notes,
    )


def gain_card(search: SearchFolder) -> Card:
    """Return the gain over the default configuration: of the confirming runs if there are some."""
    title, metric = "Gain over the default", search.metric
    winner = _winner(search)
    if winner is not None and winner["number"] == DEFAULT_NUMBER:
        return Card(title=title, value=NOTHING, detail="the default configuration is best")
    confirmed = winner and winner["difference_to_default"]
    if confirmed:
        interval = confirmed["interval_95"] or confirmed["seeds_interval_95"]
        notes = [f"on {_seeds(len(confirmed['seeds']))}"]
        if confirmed["p_value"] is not None:
            notes[0] += f", p\N{NO-BREAK SPACE}{_p_value(confirmed['p_value'])}"
        if confirmed["interval_95"] and confirmed["seeds_interval_95"]:
            between = difference_interval(confirmed["seeds_interval_95"], metric)
            notes.append(f"other seeds might give {between}")
        return _gain(title, metric, confirmed["mean"], interval, notes)
    best, default = search.best_trial, search.default
    if best is None or default is None or metric not in default.metrics:
        return Card(title=title, value=NOTHING, detail="the default trial has no value yet")
    if best is default:
        return Card(title=title, value=NOTHING, detail="the default configuration is best so far")
    if default.state != "completed":
        return Card(title=title, value=NOTHING, detail=f"the default trial has {default.state}")
    gain = best.metrics[metric] - default.metrics[metric]
    notes = ["not confirmed on fresh seeds: the best of many looks better than it is"]
    interval = interval_by_questions(best, default, metric, search.folder / ANSWERS_DIR)
    return _gain(title, metric, gain, interval, notes)


def _gain(
    title: str,
    metric: str,
    mean: float,
    interval: Sequence[float] | None,
    notes: Sequence[str],
) -> Card:
    shown = difference_interval(interval, metric)
    return Card(
        title=title,
        value=difference(mean, metric),
        detail=f"95 % interval {shown}" if shown else "",
        notes=notes,
    )


def _winner(search: SearchFolder) -> Mapping[str, Any] | None:
    """Return the configuration that the confirming runs chose."""
    confirmation = search.confirmation
    if confirmation is None or confirmation["winner"] is None:
        return None
    winner: Mapping[str, Any] = confirmation["configurations"][0]
    return winner


def _p_value(p: float) -> str:
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"=\N{NO-BREAK SPACE}{p:.2g}"


def _seeds(number: int) -> str:
    return "1 fresh seed" if number == 1 else f"{number} fresh seeds"


def time_card(search: SearchFolder) -> Card:
    """Return what the search took."""
    summary = search.summary
    trained = f"{duration(summary['training_seconds'])} of training and evaluation"
    has_gpus = search.devices[0] == "GPU" or summary["gpu_hours"] > 0
    notes = [f"{summary['gpu_hours']:.2f} GPU-hours" if has_gpus else "on the CPU, no GPU-hours"]
    median = summary["turnaround_seconds"]["median"]
    if median is not None:
        notes.append(f"{duration(median)} between two trials (median)")
    return Card(
        title="Wall time", value=duration(summary["wall_seconds"]), detail=trained, notes=notes
    )


def best_values(search: SearchFolder) -> list[BestValue]:
    """Return the searched keys of the best configuration beside the default one's."""
    if search.best is None:
        return []
    default = search.default.parameters if search.default else {}
    if search.space is not None:
        default = search.space.default_values()
    return [
        BestValue(
            key=parameter.key,
            best=_own(search.best.parameters, parameter.key),
            default=_own(default, parameter.key),
        )
        for parameter in search.parameters
    ]


def _own(values: Mapping[str, Any], key: str) -> str:
    return setting(values[key]) if key in values else "not used"


def run_again_command(search: SearchFolder) -> str | None:
    """Return the command that trains the best configuration again, if it was written down."""
    path = search.best_config_file
    return None if path is None else f"python run_single.py --config {shlex.quote(str(path))}"


def verdict(search: SearchFolder) -> tuple[str, bool] | None:
    """Return the sentence on the confirmation, and whether there is a gain that counts."""
    confirmation = search.confirmation
    if confirmation is None:
        return None
    text = confirmation["verdict"]
    # A summary of an earlier version, all that is left of its confirmation, does not say it.
    counts = confirmation.get("gain_counts")
    if counts is None:
        counts = gain_counts(confirmation["configurations"], search.objective)
    return text[:1].upper() + text[1:] + ".", bool(counts)
