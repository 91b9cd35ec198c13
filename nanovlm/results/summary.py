"""What a search comes to, as pure functions of its trials' records."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import confirmation_by_what_is_left
from nanovlm.results.pareto import choose, pareto_summary
from nanovlm.results.read import ANSWERS_DIR, BEST_CONFIG_FILE, TRIALS_FILE, FolderReader, read_text

NUM_ITEMS = "mmstar_num_items"
"""The metric that tells on how many questions the accuracies stand."""

RULES_BEFORE_THERE_WERE_OTHERS = "lmms-eval-0.7.1"
"""By which trials were scored whose configuration does not say it."""

_PROPORTIONS = ("mmstar_accuracy", "mmstar_letter_accuracy")
_Z_95 = statistics.NormalDist().inv_cdf(0.975)


def best_record(records: Sequence[TrialRecord], objective: Objective) -> TrialRecord | None:
    """Return the best trial that ran its full budget; of equal ones the first.

    With several objectives it is the one that is chosen from their front (`tradeoff.choose`).
    """
    if len(objective.all) > 1:
        choice = choose(records, objective)
        return None if choice is None else choice.record
    completed = [record for record in records if record.state == "completed"]
    return next(iter(rank(completed, objective)), None)


def rank(records: Sequence[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """Return the trials that have the objective, the best first; of equal ones the earlier."""
    judged = [record for record in records if objective.metric in record.metrics]
    sign = -1 if objective.mode == "max" else 1
    return sorted(judged, key=lambda record: sign * record.metrics[objective.metric])


def summarize(
    name: str,
    records: Sequence[TrialRecord],
    objective: Objective,
    *,
    wall_seconds: float,
    gpus_per_trial: float,
    confirmed: Sequence[TrialRecord] = (),
    confirmation: Mapping[str, Any] | None = None,
    paused: Sequence[TrialRecord] = (),
    ended_by: str | None = None,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        ended_by: why it is over; None while it runs.
        confirmed: the runs that confirm; their time counts.
        confirmation: what they come to; its winner is the best.
        paused: trials that wait to go on; their time counts, the total is without them.
    """
    best = final_best(records, objective, confirmed, confirmation)
    everything = [*records, *paused, *confirmed]
    seconds = training_seconds(everything)
    states = [record.state for record in records]
    return {
        "name": name,
        "ended_by": ended_by,
        "objective": {"metric": objective.metric, "mode": objective.mode},
        "mmstar_rules": mmstar_rules(everything[0].config) if everything else None,
        "trials": {
            "total": len(records),
            **{state: states.count(state) for state in ("completed", "stopped", "failed")},
            "paused": len(paused),
        },
        "best": best and _best(best, objective.metric),
        **({"pareto": pareto_summary(records, objective)} if len(objective.all) > 1 else {}),
        "confirmation": confirmation,
        "turnaround_seconds": _median_p95_max(turnarounds(everything)),
        "wall_seconds": wall_seconds,
        "training_seconds": seconds,
        "gpu_hours": seconds * gpus_per_trial / 3600,
    }


def mmstar_rules(config: Mapping[str, Any]) -> str:
    """Return what counted as a right answer in a run of this configuration."""
    return str(config.get("mmstar_rules", RULES_BEFORE_THERE_WERE_OTHERS))


def by_rules(config: Mapping[str, Any], metric: str) -> str:
    """Return what belongs beside an accuracy, such as ` (lmms-eval-0.7.2)`; nothing for others."""
    return f" ({mmstar_rules(config)})" if metric.startswith("mmstar_accuracy") else ""


def training_seconds(records: Sequence[TrialRecord]) -> float:
    """Return how long the trials took up to their last reports, evaluation included."""
    return sum(r.reports[-1].seconds for r in records if r.reports)


def final_best(
    records: Sequence[TrialRecord],
    objective: Objective,
    confirmed: Sequence[TrialRecord],
    confirmation: Mapping[str, Any] | None,
) -> TrialRecord | None:
    """Return the run that `best.yaml` and `best/` are of.

    That is the first run that confirms the winner, or before there is one the best trial. With
    several objectives the winner is the trial that was chosen, whatever the runs say of the first.
    """
    best = best_record(records, objective)
    if confirmation is None or confirmation["winner"] is None:
        return best
    winner = confirmation["winner"]
    if len(objective.all) > 1:
        winner = None if best is None else best.number
    runs = [r for r in confirmed if r.number == winner and r.state == "completed"]
    return min(runs, key=lambda run: run.config["seed"], default=best)


def turnarounds(records: Sequence[TrialRecord]) -> list[float]:
    """Return, for each leg of a trial that followed another in its worker group, the seconds from
    the last work on that one to the end of the first optimizer step of this one."""
    seconds = []
    free_at: dict[str, float] = {}  # by worker group
    legs = [leg for record in records for leg in record.legs]
    for leg in sorted(legs, key=lambda leg: leg.first_step_at or leg.ended_at):
        if leg.first_step_at is not None and leg.worker_group in free_at:
            seconds.append(leg.first_step_at - free_at[leg.worker_group])
        free_at[leg.worker_group] = leg.ended_at
    return seconds


def wilson_interval(proportion: float, num_items: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, without continuity correction)."""
    z2 = _Z_95**2
    center = (proportion + z2 / (2 * num_items)) / (1 + z2 / num_items)
    spread = proportion * (1 - proportion) / num_items + z2 / (4 * num_items**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / num_items)
    return max(0.0, center - half), min(1.0, center + half)


def interval_95(metrics: Mapping[str, float], metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric over the benchmark's items, if it is a proportion."""
    if metric not in _PROPORTIONS or NUM_ITEMS not in metrics:
        return None
    return wilson_interval(metrics[metric], int(metrics[NUM_ITEMS]))


def describe_accuracy(metrics: Mapping[str, float], metric: str) -> str:
    """Return the metric's value with its interval, such as `0.931 [0.915, 0.944]`."""
    interval = interval_95(metrics, metric)
    value = f"{metrics[metric]:.4g}"
    if interval is None:
        return value
    return f"{metrics[metric]:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _best(record: TrialRecord, metric: str) -> dict[str, Any]:
    return {
        "trial_id": record.trial_id,
        "number": record.number,
        "config": dict(record.config),
        "parameters": dict(record.parameters),
        "metrics": dict(record.metrics),
        "interval_95": interval_95(record.metrics, metric),
        "samples_seen": record.samples_seen,
    }


def _median_p95_max(seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {"median": None, "p95": None, "max": None}
    ordered = sorted(seconds)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}


def count_anew(
    folder: Path,
    summary: Mapping[str, Any] | None,
    records: Sequence[TrialRecord],
    confirmed: Sequence[TrialRecord],
    confirmation: Mapping[str, Any] | None,
    objective: Objective,
    space: SearchSpace | None,
    paused: Sequence[TrialRecord],
) -> dict[str, Any]:
    """Return the summary of the records that there are.

    Args:
        summary: as it was last written, perhaps before some of the trials; None if it is lost.
    """
    known = summary or {"wall_seconds": busy_seconds([*records, *confirmed]), "ended_by": None}
    if space is not None:
        gpus = space.resources.gpus_per_trial
    else:
        seconds = known.get("training_seconds")
        gpus = known["gpu_hours"] * 3600 / seconds if seconds else 0.0
    content = summarize(
        folder.resolve().name,
        records,
        objective,
        wall_seconds=known["wall_seconds"],
        gpus_per_trial=gpus,
        confirmed=confirmed,
        confirmation=confirmation,
        paused=paused,
        # Summaries of an earlier version do not say why a search is over.
        ended_by=known.get("ended_by", "not recorded"),
    )
    return dict(json.loads(json.dumps(content)))  # as it is read


def busy_seconds(records: Sequence[TrialRecord]) -> float:
    """Return how long at least one of the trials was under way, by their times."""
    spans = sorted((r.submitted_at, r.ended_at or r.submitted_at) for r in records)
    seconds, until = 0.0, float("-inf")
    for begin, end in spans:
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def best_of(reader: FolderReader) -> TrialRecord | None:
    """Return the best run by what can be read of the records; None if none ran its full budget."""
    records, confirmed = reader.ended()
    space = reader.space(records)
    objective = space.objective if space else reader.objective()
    confirmation, _ = confirmation_by_what_is_left(
        confirmed, records, objective, reader.folder / ANSWERS_DIR
    )
    return final_best(records, objective, confirmed, confirmation)


def check_best_config(path: Path) -> None:
    """Raise UserError if `path` is the `best.yaml` of a results folder and lacks keys: it is cut.

    Without this the defaults would stand in for what is lost.
    """
    reader = FolderReader(path.parent)
    if path.name != BEST_CONFIG_FILE or not path.exists() or not reader.has(TRIALS_FILE):
        return
    if not (read_text(path) or "").endswith("\n"):
        raise UserError(f"{path}: is cut in its last line; --resume of its search writes it anew")
    best = best_of(reader)
    if best is None:
        return
    lacks = [
        *(flat_values(best.config).keys() - flat_values(reader.config(path.name) or {}).keys())
    ]
    if lacks:
        raise UserError(
            f"{path}: is cut: it lacks {len(lacks)} keys of {best.trial_id}, such as "
            f"{min(lacks)}; --resume of its search writes it anew"
        )
