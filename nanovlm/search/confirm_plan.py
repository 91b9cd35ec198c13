"""Which runs confirm a search: the best configurations and the default one, on fresh seeds.

Pure functions of the space and of what has ended, so that a search which was interrupted while it
confirmed plans the same runs again and leaves out what is done.
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
from nanovlm.results.verdict import DEFAULT_NUMBER
from nanovlm.search.space import SearchSpace

ENOUGH_TRIALS = 3
"""So many must have come to a milestone for its values to choose between configurations. The very
first trials get far with whatever values they have."""


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
    """What is still to be run, in this order."""

    runs: tuple[ConfirmRun, ...]
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


def confirm_seeds(space: SearchSpace) -> tuple[int, ...]:
    """Return the seeds of the confirming runs: the first above all that the search can have used.

    They follow from the space alone and are the same for every configuration, so that each seed
    gives a pair of runs which see the same data in the same order.
    """
    searched = [value for p in space.parameters if p.key == "seed" for value in p.values]
    used: list[Any] = [space.base.seed, *searched]
    return tuple(max(used) + 1 + i for i in range(space.confirm.seeds))


def plan_confirmation(
    space: SearchSpace, records: Sequence[TrialRecord], done: Sequence[TrialRecord] = ()
) -> ConfirmPlan:
    """Return the runs that confirm the search, without those that are done.

    These are the `confirm.top` best configurations, as far as most trials came to be compared, and
    the default one; trials that differ in their seed alone are one configuration. The runs go seed
    by seed, and of each seed the best configuration and the default one come first: whatever the
    time suffices for is comparable.

    Args:
        records: the ended trials of the search.
        done: ended runs of an earlier plan, however they ended.
    """
    default = next((r for r in records if r.number == DEFAULT_NUMBER), None)
    default_config = space.base if default is None else _config_of(default)
    best = _best_configurations(space, records, default_config)[: space.confirm.top]
    if not best:
        return ConfirmPlan(runs=(), notes=_notes_without_runs(space))
    chosen = [(r.number, dict(r.parameters), _config_of(r)) for r in best]
    notes = []
    if default is not None and default.state == "failed":
        notes.append(
            f"the default configuration (trial {DEFAULT_NUMBER}) failed and is not run again, so "
            f"nothing is compared with it: {default.reason}"
        )
    else:
        values = space.default_values() if default is None else dict(default.parameters)
        chosen.insert(1, (DEFAULT_NUMBER, values, default_config))
    ended = {record.trial_id for record in done}
    runs = [
        _run(space, number, parameters, config, seed)
        for seed in confirm_seeds(space)
        for number, parameters, config in chosen
    ]
    return ConfirmPlan(
        runs=tuple(run for run in runs if run.trial_id not in ended), notes=tuple(notes)
    )


def _division(config: TrainConfig) -> tuple[float, str]:
    return config.mmstar_holdout, config.mmstar_part


def _notes_without_runs(space: SearchSpace) -> tuple[str, ...]:
    if not space.confirm.top:
        return ()
    return ("nothing to confirm: no configuration but the default one has reported",)


def _best_configurations(
    space: SearchSpace, records: Sequence[TrialRecord], default: TrainConfig
) -> list[TrialRecord]:
    """Return the best trial of each configuration besides the default one, the best first.

    Trials are compared at the furthest milestone that ENOUGH_TRIALS have reached; those that have
    not come there follow, by how far they came.
    """
    metric = space.objective.metric
    sign = -1 if space.objective.mode == "max" else 1
    judged = [r for r in records if r.state != "failed" and metric in r.metrics]
    counts = sorted((len(record.reports) for record in judged), reverse=True)
    furthest = counts[min(ENOUGH_TRIALS, len(counts)) - 1] if counts else 0

    def rank(record: TrialRecord) -> tuple[int, float, int]:
        reached = min(len(record.reports), furthest)
        value = record.reports[reached - 1].metrics[metric]
        return -reached, sign * value, record.number

    best: dict[str, TrialRecord] = {}
    for record in sorted(judged, key=rank):
        best.setdefault(_identity(_config_of(record)), record)
    best.pop(_identity(default), None)
    return list(best.values())


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
