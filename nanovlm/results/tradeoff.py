"""Which trial a search with several objectives takes, and what else there was: the Pareto front.

Pure functions of the trials' records. With one objective the choice is the best by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovlm.messages import TrialRecord
from nanovlm.metrics import least_extent, measured
from nanovlm.results.pareto import Box, Floats, best_first, front_ranks, knee
from nanovlm.search.sections import Objective


@dataclass(frozen=True)
class Choice:
    """What a search with several objectives comes to."""

    record: TrialRecord
    how: str
    """`knee`, `bounds`, or `nearest to the bounds`."""
    front: Sequence[TrialRecord]
    """The trials of full length that none of them dominates, the best by the first objective
    first."""
    hypervolume: float
    """Of the front, as a share of what lies between its best values and the reference point."""
    reference: Sequence[float]
    """The reference point, in the objectives' own units."""


def losses(objective: Objective, rows: Sequence[Sequence[float]]) -> Floats:
    """Return float[n, k], less is better, of the values of n trials for k objectives."""
    every = objective.all
    found = [[o.loss(v) for o, v in zip(every, row, strict=True)] for row in rows]
    return np.array(found, dtype=float).reshape(-1, len(every))


def least_extents(objective: Objective) -> list[float]:
    """Return float[k]: see `Box.around`."""
    return [least_extent(each.metric) for each in objective.all]


def order(objective: Objective, rows: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the values of several trials, the best first; of equal ones the earlier.

    With several objectives by front, and within one by the share in its hypervolume.
    """
    return best_first(losses(objective, rows), least_extents(objective))


def values_of(objective: Objective, record: TrialRecord) -> tuple[float, ...] | None:
    """Return the values of a trial's last report, None if it has not all of them."""
    if not record.reports:
        return None
    found = measured(record.reports[-1])
    return objective.values_in(found) if all(o.metric in found for o in objective.all) else None


def choose(records: Sequence[TrialRecord], objective: Objective) -> Choice | None:
    """Return which of the trials of full length a search takes; None if there are none.

    Without bounds the knee of the front (`pareto.knee`); with bounds the best by the first
    objective of the trials that keep them all, or else the trial that is the nearest to keeping
    them, in the units of the front.
    """
    known = [(r, v) for r in records if r.state == "completed" and (v := values_of(objective, r))]
    if not known:
        return None
    completed, values = [record for record, _ in known], [row for _, row in known]
    rows, least = losses(objective, values), least_extents(objective)
    front = np.flatnonzero(front_ranks(rows) == 0)
    front = front[np.lexsort((front, *rows[front].T[::-1]))]
    box = Box.around(rows, least)
    excess = np.array([[_excess(o, v) for o, v in zip(objective.all, r, strict=True)]
                       for r in values])  # fmt: skip
    lacks = (excess / box.extent).sum(axis=1)
    if all(o.bound is None for o in objective.all):
        place, how = int(front[knee(rows[front], least)]), "knee"
    else:
        place = int(np.lexsort((np.arange(len(rows)), *rows.T[::-1], lacks))[0])
        how = "bounds" if lacks[place] == 0 else "nearest to the bounds"
    return Choice(
        record=completed[place],
        how=how,
        front=[completed[each] for each in front],
        hypervolume=box.share(rows),
        reference=[
            each.value_at(float(loss))
            for each, loss in zip(objective.all, box.reference, strict=True)
        ],
    )


def hypervolumes(records: Sequence[TrialRecord], objective: Objective) -> list[float]:
    """Return the hypervolume after each trial, measured as that of all of them is."""
    values = [values_of(objective, r) if r.state == "completed" else None for r in records]
    rows = losses(objective, [row for row in values if row is not None])
    if len(rows) == 0:
        return [0.0] * len(records)
    box = Box.around(rows, least_extents(objective))
    counts = np.cumsum([row is not None for row in values])
    shares = [0.0, *(box.share(rows[: count + 1]) for count in range(len(rows)))]
    return [shares[count] for count in counts]


def describe_choice(choice: Choice, objective: Objective) -> str:
    """Return in a sentence which trial was taken, why, and what else was on the front."""
    number = choice.record.number
    bounds = " and ".join(
        f"{o.metric} {'at most' if o.mode == 'min' else 'at least'} {o.bound:g}"
        for o in objective.all
        if o.bound is not None
    )
    metrics = ", ".join(o.metric for o in objective.all)
    first = objective.metric
    why = {
        "knee": f"trial {number} is the knee of the front of {metrics}",
        "bounds": f"trial {number} has the best {first} of the trials with {bounds}",
        "nearest to the bounds": f"no trial of full length keeps {bounds}; trial {number} is the "
        "nearest to it",
    }[choice.how]
    others = [describe_trial(r, objective) for r in choice.front if r is not choice.record]
    also = f"; also on the front: {'; '.join(others)}" if others else "; the front has no other"
    return f"{why} ({_values_text(choice.record, objective)}){also}"


def describe_values(objective: Objective, values: Sequence[float]) -> str:
    """Return `mmstar_accuracy 0.93, seconds_per_sample 0.0021`."""
    return ", ".join(f"{o.metric} {v:.4g}" for o, v in zip(objective.all, values, strict=True))


def describe_trial(record: TrialRecord, objective: Objective) -> str:
    """Return `trial 7: mmstar_accuracy 0.93, seconds_per_sample 0.0021`."""
    return f"trial {record.number}: {_values_text(record, objective)}"


def pareto_summary(records: Sequence[TrialRecord], objective: Objective) -> dict[str, Any]:
    """Return what `summary.json` has under `pareto`."""
    choice, metrics = choose(records, objective), [each.metric for each in objective.all]
    if choice is None:
        return {"objectives": objective.to_yaml(), "chosen": None, "front": []}
    return {
        "objectives": objective.to_yaml(),
        "chosen": choice.record.number,
        "chosen_by": choice.how,
        "reason": describe_choice(choice, objective),
        "front": [
            {
                "trial_id": record.trial_id,
                "number": record.number,
                "parameters": dict(record.parameters),
                "values": dict(zip(metrics, values_of(objective, record) or (), strict=True)),
            }
            for record in choice.front
        ],
        "hypervolume": choice.hypervolume,
        "reference": dict(zip(metrics, choice.reference, strict=True)),
    }


def _values_text(record: TrialRecord, objective: Objective) -> str:
    return describe_values(objective, values_of(objective, record) or ())


def _excess(objective: Objective, value: float) -> float:
    """Return by how much of its losses a value breaks the bound, 0 if it keeps it."""
    if objective.bound is None:
        return 0.0
    keeps = value <= objective.bound if objective.mode == "min" else value >= objective.bound
    gap = objective.loss(value) - objective.loss(objective.bound)
    return 0.0 if keeps else max(gap, 1e-9)
