"""What a search has found, as pure functions of its trials' records; `summary.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import confirmation_and_problems
from nanovlm.results.pareto import choose, pareto_summary
from nanovlm.results.read import ANSWERS_DIR, BEST_CONFIG_FILE, TRIALS_FILE, FolderReader, read_text
from nanovlm.results.statistics import interval_95

RULES_BEFORE_THERE_WERE_OTHERS = "lmms-eval-0.7.1"
"""By which trials were scored whose configuration does not say it."""


def best_record(records: Sequence[TrialRecord], objective: Objective) -> TrialRecord | None:
    """Return the best trial that ran its full budget; of equal ones the first.

    With several objectives it is the one that is chosen from their front (`pareto.choose`).
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
    waits = turnarounds(everything)
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
        "best": best
        and {
            "trial_id": best.trial_id,
            "number": best.number,
            "config": dict(best.config),
            "parameters": dict(best.parameters),
            "metrics": dict(best.metrics),
            "interval_95": interval_95(best.metrics, objective.metric),
            "samples_seen": best.samples_seen,
        },
        **({"pareto": pareto_summary(records, objective)} if len(objective.all) > 1 else {}),
        "confirmation": confirmation,
        "turnaround_seconds": {
            "median": float(np.median(waits)) if waits else None,
            "p95": float(np.quantile(waits, 0.95, method="inverted_cdf")) if waits else None,
            "max": max(waits, default=None),
        },
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


def recount(
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


def read_best(reader: FolderReader) -> TrialRecord | None:
    """Return the best run by what can be read of the records; None if none ran its full budget."""
    records, confirmed = reader.ended()
    space = reader.space(records)
    objective = space.objective if space else reader.objective()
    confirmation, _ = confirmation_and_problems(
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
    is_whole = (read_text(path) or "").endswith("\n")
    if is_whole and (best := read_best(reader)) is not None:
        is_whole = not flat_values(best.config).keys() - flat_values(reader.config(path.name) or {})
    if not is_whole:
        raise UserError(f"{path}: is cut; --resume of its search writes it anew")
