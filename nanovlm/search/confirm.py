"""Which runs confirm a search: the best configurations race the default one on fresh seeds."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import JUDGED_SEEDS, Confirm, Objective
from nanovlm.config.sources import Layer, build_config, config_values, earlier_values, flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.results.statistics import paired_p_value
from nanovlm.results.summary import best_record

Run = tuple[int, int]
"""Number of a configuration, and round."""

Results = Mapping[Run, float | None]
"""The value of each ended run; more is better. None if it failed."""

_EARLY_ERROR, _EARLY_ERROR_AFTER_CHOICE = 0.05, 0.01
"""Of all looks but the last, both sides together."""


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
    division = base.mmstar_holdout, base.mmstar_part
    if not holdout or division == (holdout, "search"):
        return space
    if division != (0, "all"):
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
    searched: list[Any] = [v for p in space.parameters if p.key == "seed" for v in p.values]
    return 1 + int(max([space.base.seed, *searched]))


def plan_confirmation(
    space: SearchSpace, records: Sequence[TrialRecord], done: Sequence[TrialRecord] = ()
) -> ConfirmPlan:
    """Return the runs that confirm the search and are certain now, without those that are done.

    The best configurations of the search (`rank_configurations`) and the default one race.

    Args:
        records: the ended trials of the search.
        done: ended runs of the race, however they ended.
    """
    if not space.confirm.top:
        return ConfirmPlan(runs=(), notes=())
    default = next((r for r in records if r.number == DEFAULT_NUMBER), None)
    default_config = space.base if default is None else _config_of(default)
    ranked = rank_configurations(records, space.objective, default_config)
    if not ranked:
        note = "no configuration but the default one has reported"
        if len(space.objective.all) > 1 and best_record(records, space.objective) is not None:
            note = "the chosen configuration is the default one"
        return ConfirmPlan(runs=(), notes=(f"nothing to confirm: {note}",))
    notes = list[str]()
    failed = default if default is not None and default.state == "failed" else None
    if failed is not None:
        notes.append(
            f"the default configuration (trial {DEFAULT_NUMBER}) failed and is not run again, so "
            f"nothing is compared with it: {failed.reason}"
        )
    race = Race.between(
        [r.number for r in ranked],
        DEFAULT_NUMBER if failed is None else None,
        space.confirm,
        {r.number: _value(r, space.objective) for r in ranked if r.state == "completed"},
    )
    of_number = {r.number: r for r in ranked}

    def entry(number: int) -> tuple[Mapping[str, Any], TrainConfig]:
        if number in of_number:
            return of_number[number].parameters, _config_of(of_number[number])
        return space.default_values() if default is None else default.parameters, default_config

    first_seed = first_confirm_seed(space)
    runs = [
        _run(space, number, *entry(number), first_seed + seed_round)
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

    measured = [r for r in records if r.state != "failed" and objective.metric in r.metrics]
    if len(objective.all) > 1:
        measured = [r for r in [best_record(records, objective)] if r is not None]
    defaults = earlier_values({})

    def identity(config: Mapping[str, Any]) -> str:
        return json.dumps({**defaults, **flat_values(config), "seed": 0}, sort_keys=True)

    best: dict[str, TrialRecord] = {}
    for record in sorted(measured, key=rank):
        best.setdefault(identity(record.config), record)
    best.pop(identity(config_values(default)), None)
    return list(best.values())


def _results(
    done: Sequence[TrialRecord], objective: Objective, first_seed: int
) -> dict[Run, float | None]:
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


def _config_of(record: TrialRecord) -> TrainConfig:
    return build_config(Layer(f"trial {record.number}", record.config))


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


@dataclass(frozen=True)
class Race:
    """What a race is between."""

    candidates: tuple[int, ...]
    """Numbers of the configurations that enter, the best of the search first."""
    default: int | None
    """Number of the default configuration; None if it cannot run."""
    most_runs: int
    searched: Mapping[int, float] = field(default_factory=dict)
    """What candidates reached in the search that ran in full there: for the choice between them as
    good as one more seed. The verdict does not know it, for luck has helped it."""

    @staticmethod
    def between(
        ranked: Sequence[int],
        default: int | None,
        confirm: Confirm,
        searched: Mapping[int, float] | None = None,
    ) -> "Race":
        """Return the race of a search's configurations, the best first."""
        candidates = tuple(ranked[: confirm.num_raced])
        return Race(candidates, default, confirm.most_runs, searched or {})

    def next_runs(self, results: Results) -> tuple[Run, ...]:
        """Return all runs that are certain now and have not ended; none when it is over.

        The first of them follows if one runs at a time. Later results add runs and take none away.
        """
        left, field = self.most_runs, list(self.candidates)
        seed_round = num_choices = 0
        while True:
            runners = self._runners(field)
            if not field or len(runners) > left:
                return ()
            left -= len(runners)
            wanted = [(n, seed_round) for n in runners if (n, seed_round) not in results]
            if wanted:
                return (*wanted, *self._certain_later(field, seed_round + 1, left, results))
            num_choices += len(field) > 1
            seed_round += 1
            field = self._survivors(field, seed_round, left, results)
            if len(field) == 1 and self._is_over(field[0], seed_round, num_choices, left, results):
                return ()

    def _runners(self, field: Sequence[int]) -> list[int]:
        """Return who runs in a round: whatever the time suffices for is comparable."""
        return [*field[:1], *([] if self.default is None else [self.default]), *field[1:]]

    def _certain_later(
        self, field: Sequence[int], first_round: int, left: int, results: Results
    ) -> Iterator[Run]:
        """Yield what runs before the first look whatever comes of the round under way."""
        if self.default is None:
            return
        sure = self._runners(field) if len(field) == 1 else [self.default]
        for seed_round in range(first_round, min(JUDGED_SEEDS, first_round + left // 2)):
            yield from ((n, seed_round) for n in sure if (n, seed_round) not in results)

    def _survivors(
        self, field: Sequence[int], rounds: int, left: int, results: Results
    ) -> list[int]:
        """Return who goes on after so many rounds, the best first; of equal ones the earlier."""
        means = dict[int, float]()
        for number in field:
            values = [results[number, r] for r in range(rounds)]
            finished = [value for value in values if value is not None]
            if len(finished) == rounds:
                known = [self.searched[number]] if number in self.searched else []
                means[number] = statistics.fmean([*finished, *known])
        ordered = sorted(means, key=lambda n: (-means[n], self.candidates.index(n)))
        half = math.ceil(len(ordered) / 2)
        if self.default is None:
            return ordered[: max(1, min(half, left))]
        alone = (JUDGED_SEEDS - 1) * (rounds + 1)  # rounds, should the next one choose as well
        return ordered[: max(1, min(half, left - 1 - 2 * alone))]

    def _is_over(
        self, leader: int, rounds: int, num_choices: int, left: int, results: Results
    ) -> bool:
        """Return whether it is decided early between the last candidate and the default one."""
        if self.default is None:
            return True
        first_look, last_look = JUDGED_SEEDS * max(1, num_choices), rounds + left // 2
        if not first_look <= rounds < last_look:
            return False
        gains = [
            ours - other
            for seed_round in range(rounds)
            if (ours := results[leader, seed_round]) is not None
            and (other := results[self.default, seed_round]) is not None
        ]
        error = _EARLY_ERROR_AFTER_CHOICE if num_choices else _EARLY_ERROR
        num_looks = last_look - first_look  # besides the last one, which is that of the verdict
        return len(gains) >= JUDGED_SEEDS and paired_p_value(gains) < error / num_looks


def most_batches(race: Race, slots: int) -> tuple[int, int]:
    """Return how many runs there are at most, and how many trainings long they take in parallel.

    That is a race in which nobody is ahead.
    """
    results = dict[Run, float | None]()
    num_batches = 0
    while wanted := race.next_runs(results):
        num_batches += 1
        results |= dict.fromkeys(wanted[:slots], 0.0)
    return len(results), num_batches
