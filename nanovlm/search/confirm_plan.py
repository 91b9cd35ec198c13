"""Which runs confirm a search: the best configurations race the default one on fresh seeds.

`race.py` has the rule. Pure functions of the space and of what has ended, so that a search which
was interrupted while it confirmed goes on with the run that would have followed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.config import TrainConfig
from nanovlm.config_files import Layer, build_config
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.summary import best_record
from nanovlm.results.verdict import DEFAULT_NUMBER
from nanovlm.search.race import Race
from nanovlm.search.sections import Objective
from nanovlm.search.space import SearchSpace


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmRun:
    """One configuration at full budget on one fresh seed."""

    trial_id: str
    """`confirm-7-seed-10`"""
    number: int
    """Of the trial whose configuration it is."""
    seed: int
    parameters: Mapping[str, Any]
    """Values of the searched keys, the seed left out."""
    config: TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmPlan:
    """What is to be run now."""

    runs: tuple[ConfirmRun, ...]
    """All that are certain and have not ended, in this order; what they come to decides which
    others follow. None when the race is over."""
    notes: tuple[str, ...]
    """What is left out, and why; for people."""


def with_holdout(space: SearchSpace) -> SearchSpace:
    """Return the space whose trials ask only what `confirm.holdout` leaves to them.

    Of a space that this has returned it is the same space.

    Raises:
        UserError: the base divides the benchmark otherwise.
    """
    holdout, base = space.confirm.holdout, space.base
    if not holdout or _division(base) == (holdout, "search"):
        return space
    if _division(base) != (0, "all"):
        raise UserError(
            f"confirm.holdout: divides the benchmark itself; it must be 0 (got {holdout}), or base "
            "must leave mmstar_holdout and mmstar_part at 0 and 'all', "
            f"got {base.mmstar_holdout} and {base.mmstar_part!r}"
        )
    base = dataclasses.replace(base, mmstar_holdout=holdout, mmstar_part="search")
    return dataclasses.replace(space, base=base)


def first_confirm_seed(space: SearchSpace) -> int:
    """Return the seed of the first round: the first above all that the search can have used.

    Each round has the next one. They follow from the space alone and are the same for every
    configuration, so that the runs of a round see the same data in the same order.
    """
    searched = [value for p in space.parameters if p.key == "seed" for value in p.values]
    used: list[Any] = [space.base.seed, *searched]
    return int(max(used)) + 1


def plan_confirmation(
    space: SearchSpace, records: Sequence[TrialRecord], done: Sequence[TrialRecord] = ()
) -> ConfirmPlan:
    """Return the runs that confirm the search and are certain now, without those that are done.

    The best configurations of the search (`rank_configurations`) and the default one race.

    Args:
        records: the ended trials of the search.
        done: ended runs of the race, however they ended.
    """
    default = next((r for r in records if r.number == DEFAULT_NUMBER), None)
    default_config = space.base if default is None else _config_of(default)
    ranked = rank_configurations(records, space.objective, default_config)
    if not ranked or not space.confirm.top:
        return ConfirmPlan(runs=(), notes=_notes_without_runs(space, records))
    entries = {r.number: (dict(r.parameters), _config_of(r)) for r in ranked}
    notes = []
    can_run_default = default is None or default.state != "failed"
    if can_run_default:
        values = space.default_values() if default is None else dict(default.parameters)
        entries[DEFAULT_NUMBER] = values, default_config
    else:
        assert default is not None, "a trial has failed"
        notes.append(
            f"the default configuration (trial {DEFAULT_NUMBER}) failed and is not run again, so "
            f"nothing is compared with it: {default.reason}"
        )
    race = Race.between(
        [r.number for r in ranked],
        DEFAULT_NUMBER if can_run_default else None,
        space.confirm,
        {r.number: _value(r, space.objective) for r in ranked if r.state == "completed"},
    )
    first_seed = first_confirm_seed(space)
    runs = [
        _run(space, number, *entries[number], first_seed + seed_round)
        for number, seed_round in race.next_runs(_results(done, space.objective, first_seed))
    ]
    return ConfirmPlan(runs=tuple(runs), notes=tuple(notes))


def rank_configurations(
    records: Sequence[TrialRecord], objective: Objective, default: TrainConfig
) -> list[TrialRecord]:
    """Return a trial of each configuration besides the default one, the likeliest best first.

    That is the one with the best last value, wherever it stopped or paused; of equal ones the one
    that came further, then the earlier one. Trials that differ in their seed alone are one
    configuration. A paused trial is not trained to its end before: a fresh seed in full says of its
    configuration what the rest of its own training would, and without the luck that had it chosen.

    With several objectives it is the trial alone that is chosen from their front: the others stand
    for other trade-offs, between which runs that compare the first objective must not decide.
    """

    def rank(record: TrialRecord) -> tuple[float, int, int]:
        return -_value(record, objective), -record.samples_seen, record.number

    judged = [r for r in records if r.state != "failed" and objective.metric in r.metrics]
    if len(objective.all) > 1:
        judged = [r for r in [best_record(records, objective)] if r is not None]
    best: dict[str, TrialRecord] = {}
    for record in sorted(judged, key=rank):
        best.setdefault(_identity(_config_of(record)), record)
    best.pop(_identity(default), None)
    return list(best.values())


def _results(
    done: Sequence[TrialRecord], objective: Objective, first_seed: int
) -> dict[tuple[int, int], float | None]:
    """Return what the runs came to, as the race sees it."""
    return {
        (run.number, run.config["seed"] - first_seed): _value(run, objective)
        if run.state == "completed" and objective.metric in run.metrics
        else None
        for run in done
    }


def _value(record: TrialRecord, objective: Objective) -> float:
    """Return the last value of a trial or a run as the race sees it: more is better."""
    value = record.metrics[objective.metric]
    return value if objective.mode == "max" else -value


def _division(config: TrainConfig) -> tuple[float, str]:
    return config.mmstar_holdout, config.mmstar_part


def _notes_without_runs(space: SearchSpace, records: Sequence[TrialRecord]) -> tuple[str, ...]:
    if not space.confirm.top:
        return ()
    if len(space.objective.all) > 1 and best_record(records, space.objective) is not None:
        return ("nothing to confirm: the chosen configuration is the default one",)
    return ("nothing to confirm: no configuration but the default one has reported",)


def _config_of(record: TrialRecord) -> TrainConfig:
    return build_config(Layer(f"trial {record.number}", record.config))


def _identity(config: TrainConfig) -> str:
    """Return a text that two configurations share if they differ in their seed at most."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, seed=0)), sort_keys=True)


def _run(
    space: SearchSpace,
    number: int,
    parameters: Mapping[str, Any],
    config: TrainConfig,
    seed: int,
) -> ConfirmRun:
    changes: dict[str, Any] = {"seed": seed}
    if space.confirm.holdout:
        changes |= {"mmstar_holdout": space.confirm.holdout, "mmstar_part": "holdout"}
    return ConfirmRun(
        trial_id=f"confirm-{number}-seed-{seed}",
        number=number,
        seed=seed,
        parameters={key: value for key, value in parameters.items() if key != "seed"},
        config=dataclasses.replace(config, **changes),
    )
