"""Which runs confirm a search: configurations, seeds, order, and the questions they are asked."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.messages import Kind, TrialRecord
from nanovlm.search.confirm import (
    ConfirmPlan,
    first_confirm_seed,
    plan_confirmation,
    rank_configurations,
    with_holdout,
)
from tests.records import make_record, make_report, make_speed

SPACE = """
preset: digits
base: {seed: 3}
search: {lr_mp: default, batch_size: {choice: [16, 32, 64]}}
"""


def space_of(
    folder: Path, settings: dict[str, Any] | None = None, text: str = SPACE
) -> SearchSpace:
    (folder / "space.yaml").write_text(text)
    return load_space(folder / "space.yaml", settings)


def record(
    space: SearchSpace,
    number: int,
    value: float | None,
    state: Any = "completed",
    samples: int | None = None,
    **changes: Any,
) -> TrialRecord:
    """Return a trial as it is read from `trials.jsonl`; a full one has 200 samples."""
    metrics = {} if value is None else {space.objective.metric: value}
    samples = samples or {"failed": 0, "stopped": 100, "completed": 200}[state]
    parameters = space.default_values() | changes
    config = json.loads(json.dumps(config_values(space.config_for(parameters))))
    return make_record(
        number,
        state,
        parameters=parameters,
        config=config,
        reports=[make_report(samples, metrics)] if samples else [],
        reason="out of memory" if state == "failed" else None,
    )


def search(space: SearchSpace) -> list[TrialRecord]:
    """Return trials in the order of their end; 5, 2, 7, 3 and 1 are the best ones."""
    return [
        record(space, 1, 0.60, lr_mp=0.01),
        record(space, 0, 0.50),
        record(space, 2, 0.80, lr_mp=0.02),
        record(space, 3, 0.65, "stopped", lr_mp=0.03),
        record(space, 4, None, "failed", lr_mp=0.04),
        record(space, 5, 0.90, lr_mp=0.05),
        record(space, 6, 0.10, lr_mp=0.06),
        record(space, 7, 0.70, lr_mp=0.07),
    ]


def ended(
    plan: ConfirmPlan, state: Any = "completed", values: Mapping[int, float] | None = None
) -> list[TrialRecord]:
    """Return the records of the plan's runs; by default the search was right."""
    values = values or {5: 0.90, 2: 0.80, 7: 0.70}
    return [
        make_record(
            run.number,
            state,
            {"mmstar_accuracy": values.get(run.number, 0.5) + run.seed / 100},
            trial_id=run.trial_id,
            kind=Kind.CONFIRM,
            parameters=run.parameters,
            config=config_values(run.config),
        )
        for run in plan.runs
    ]


def numbers_and_seeds(plan: ConfirmPlan) -> list[tuple[int, int]]:
    return [(run.number, run.seed) for run in plan.runs]


def whole_race(
    space: SearchSpace, records: Sequence[TrialRecord], slots: int = 1, **changes: Any
) -> list[TrialRecord]:
    """Return the runs of a race in the order of their end."""
    done: list[TrialRecord] = []
    while (plan := plan_confirmation(space, records, done)).runs:
        done += ended(dataclasses.replace(plan, runs=plan.runs[:slots]), **changes)
    return done


def raced(done: Sequence[TrialRecord]) -> list[tuple[int, int]]:
    return [(run.number, run.config["seed"]) for run in done]


def test_the_best_race_the_default_one_seed_by_seed(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    plan = plan_confirmation(space, search(space))
    certain = [(5, 4), (0, 4), (2, 4), (7, 4)]
    assert numbers_and_seeds(plan) == [*certain, (0, 5), (0, 6)]
    assert [run.trial_id for run in plan.runs[:2]] == ["confirm-5-seed-4", "confirm-0-seed-4"]
    assert plan.notes == ()
    done = whole_race(space, search(space))
    assert raced(done) == [*certain, (5, 5), (0, 5), (5, 6), (0, 6)]


def test_fresh_seeds_choose_and_not_the_search(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    done = whole_race(space, search(space), values={5: 0.1, 7: 0.9})
    assert [number for number, seed in raced(done) if seed > 4 and number] == [7, 7]
    space = space_of(tmp_path, {"objective.mode": "min"})
    done = whole_race(space, search(space), values={6: 0.9, 1: 0.3, 3: 0.8})
    assert [number for number, seed in raced(done) if seed > 4 and number] == [1, 1]


def test_a_full_trial_counts_as_a_seed_in_the_choice(tmp_path: Path) -> None:
    """3 was stopped, so its value is none of the full length."""
    space = space_of(tmp_path)
    trials = [
        record(space, 5, 0.90, lr_mp=0.05),
        record(space, 3, 0.95, "stopped", lr_mp=0.03),
        record(space, 2, 0.70, lr_mp=0.02),
    ]
    for values, winner in (({5: 0.5, 3: 0.6}, 5), ({5: 0.5, 3: 0.8}, 3)):
        done = whole_race(space, trials, values=values)
        assert [number for number, seed in raced(done) if seed > 4 and number] == [winner] * 2


def test_a_run_differs_from_its_trial_in_the_seed_alone(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    for run in plan_confirmation(space, search(space)).runs:
        values = {"lr_mp": 0.01 * run.number} if run.number else {}
        trial = space.config_for(space.default_values() | values)
        assert dataclasses.replace(run.config, seed=3, lr_mp=trial.lr_mp) == trial
        assert run.config.lr_mp == pytest.approx(trial.lr_mp)
        assert run.config.seed == run.seed
        assert run.parameters.keys() == {"lr_mp", "batch_size"}


def ranked(space: SearchSpace, records: Sequence[TrialRecord]) -> list[int]:
    return [r.number for r in rank_configurations(records, space.objective, space.base)]


def test_the_last_value_ranks_a_trial_wherever_it_stopped(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    assert ranked(space, search(space)) == [5, 2, 7, 3, 1, 6]


def test_of_equal_last_values_who_came_further_is_first_then_the_earlier(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    records = [
        record(space, 4, 0.8, "stopped", lr_mp=0.04),
        record(space, 3, 0.8, lr_mp=0.03),
        record(space, 2, 0.8, "stopped", samples=150, lr_mp=0.02),
        record(space, 1, 0.8, "stopped", lr_mp=0.01),
    ]
    assert ranked(space, records) == [3, 2, 1, 4]


def test_the_lowest_value_is_best_where_that_is_the_objective(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"objective.metric": "val_loss", "objective.mode": "min"})
    assert ranked(space, search(space)) == [6, 1, 3, 7, 2, 5]


def test_the_number_of_runs_is_as_asked(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.top": 1, "confirm.seeds": 3})
    assert raced(whole_race(space, search(space))) == [
        (n, seed) for seed in (4, 5, 6) for n in (5, 0)
    ]
    space = space_of(tmp_path, {"confirm.runs": 12})
    assert len(whole_race(space, search(space))) == 11
    nothing = space_of(tmp_path, {"confirm.top": 0})
    assert plan_confirmation(nothing, search(nothing)) == ConfirmPlan(runs=(), notes=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confirm.runs": 1}, r"confirm\.runs: .*2"),
        ({"confirm.runs": 8, "confirm.seeds": 2}, r"confirm\.seeds: .* confirm\.runs=8"),
        ({"confirm.seeds": 0}, r"confirm\.seeds"),
        ({"confirm.top": -1}, r"confirm\.top"),
        ({"confirm.run": 3}, r"confirm\.run\b.*runs"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(tmp_path, settings)


def test_what_is_written_of_a_space_gives_the_same_race(tmp_path: Path) -> None:
    for settings in ({}, {"confirm.seeds": 3}, {"confirm.runs": 12, "confirm.top": 4}):
        space = space_of(tmp_path, settings)
        assert space_of(tmp_path, text=space.to_yaml()).confirm == space.confirm


def test_trials_that_are_one_configuration_count_once(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    again = [
        record(space, 8, 0.9, lr_mp=0.05),
        record(space, 9, 0.95, lr_mp=0.02),
        record(space, 10, 0.97),  # the default one
    ]
    assert ranked(space, search(space) + again) == [9, 5, 7, 3, 1, 6]
    plan = plan_confirmation(space, search(space) + again)
    assert [run.number for run in plan.runs if run.seed == 4] == [9, 0, 5, 7]


def test_a_searched_seed_is_replaced_by_one_that_no_trial_can_have_had(tmp_path: Path) -> None:
    text = "preset: digits\nsearch: {lr_mp: default, seed: {int: [0, 9]}}"
    space = space_of(tmp_path, {"confirm.top": 2}, text)
    assert first_confirm_seed(space) == 10
    trials = [
        record(space, 0, 0.5),
        record(space, 1, 0.8, lr_mp=0.02, seed=9),
        record(space, 2, 0.9, lr_mp=0.02, seed=4),
        record(space, 3, 0.7, lr_mp=0.03, seed=4),
        record(space, 4, 0.95, seed=7),  # the default configuration with another seed
    ]
    plan = plan_confirmation(space, trials)
    certain = [(2, 10), (0, 10), (3, 10), (0, 11), (0, 12)]
    assert numbers_and_seeds(plan) == certain
    assert all(run.config.seed == run.seed for run in plan.runs)
    assert all(run.parameters.keys() == {"lr_mp"} for run in plan.runs)


def test_the_first_fresh_seed_is_above_all_of_the_search(tmp_path: Path) -> None:
    text = "preset: digits\nsearch: {lr_mp: default, seed: {choice: [2, 50, 7]}}\nbase: {seed: 2}"
    assert first_confirm_seed(space_of(tmp_path, text=text)) == 51


def test_the_default_one_is_run_though_it_was_stopped_or_never_ended(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.runs": 2})
    others = [trial for trial in search(space) if trial.number]
    for trials in (others, [record(space, 0, 0.2, "stopped"), *others]):
        plan = plan_confirmation(space, trials)
        assert [run.number for run in plan.runs] == [5, 0]
        assert plan.runs[1].config == dataclasses.replace(space.base, seed=4)
        assert plan.runs[1].parameters == space.default_values()
        assert plan.notes == ()


def test_a_default_one_that_failed_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    others = [trial for trial in search(space) if trial.number]
    plan = plan_confirmation(space, [record(space, 0, None, "failed"), *others])
    assert [run.number for run in plan.runs] == [5, 2, 7]
    (note,) = plan.notes
    assert "trial 0" in note and "out of memory" in note


def test_with_nothing_to_compare_nothing_is_run(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    alone: Sequence[TrialRecord]
    for alone in ([], [record(space, 0, 0.5)], [record(space, 3, None, "failed", lr_mp=0.1)]):
        plan = plan_confirmation(space, alone)
        assert plan.runs == ()
        assert plan.notes == (
            "nothing to confirm: no configuration but the default one has reported",
        )


def test_a_race_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    done = whole_race(space, search(space))
    for number in range(len(done) + 1):
        rest = plan_confirmation(space, search(space), done[:number])
        assert [run.trial_id for run in rest.runs[:1]] == [
            run.trial_id for run in done[number : number + 1]
        ]
    assert {*raced(whole_race(space, search(space), slots=8))} == {*raced(done)}


def test_who_fails_on_a_fresh_seed_is_not_run_again(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    first = plan_confirmation(space, search(space)).runs[0]
    failed = ended(ConfirmPlan(runs=(first,), notes=()), "failed")
    done = ended(plan_confirmation(space, search(space), failed))
    follow = plan_confirmation(space, search(space), failed + done).runs
    assert [(run.number, run.seed) for run in follow] == [(2, 5), (2, 6)]


def test_the_holdout_is_asked_by_the_confirming_runs_alone(tmp_path: Path) -> None:
    space = with_holdout(space_of(tmp_path, {"confirm.holdout": 0.5}))
    trial = space.config_for({"lr_mp": 0.1})
    assert (trial.mmstar_holdout, trial.mmstar_part) == (0.5, "search")
    for run in plan_confirmation(space, search(space)).runs:
        assert (run.config.mmstar_holdout, run.config.mmstar_part) == (0.5, "holdout")


def test_dividing_the_benchmark_twice_is_dividing_it_once(tmp_path: Path) -> None:
    whole = space_of(tmp_path)
    assert with_holdout(whole) is whole
    once = with_holdout(space_of(tmp_path, {"confirm.holdout": 0.5}))
    assert with_holdout(once) == once
    assert with_holdout(space_of(tmp_path, text=once.to_yaml())) == once


def test_without_a_holdout_the_runs_ask_what_the_trials_asked(tmp_path: Path) -> None:
    space = with_holdout(space_of(tmp_path, {"mmstar_holdout": 0.25, "mmstar_part": "search"}))
    for run in plan_confirmation(space, search(space)).runs:
        assert (run.config.mmstar_holdout, run.config.mmstar_part) == (0.25, "search")


@pytest.mark.parametrize(
    "base", [{"mmstar_holdout": 0.25}, {"mmstar_holdout": 0.5, "mmstar_part": "holdout"}]
)
def test_a_base_that_divides_the_benchmark_otherwise_is_refused(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    space = space_of(tmp_path, {"confirm.holdout": 0.5} | base)
    with pytest.raises(UserError, match=r"confirm\.holdout: .*\(got 0\.5\).* got 0\.25|0\.5 and"):
        with_holdout(space)


TWO: dict[str, Any] = {
    "objective": [{"metric": "mmstar_accuracy"}, {"metric": "seconds_per_sample"}]
}


def with_seconds(record: TrialRecord, seconds: float) -> TrialRecord:
    speed = make_speed(samples_per_second=1 / seconds)
    reports = [dataclasses.replace(report, speed=speed) for report in record.reports]
    return dataclasses.replace(record, reports=tuple(reports))


def test_of_several_objectives_only_the_chosen_trial_is_confirmed(tmp_path: Path) -> None:
    """The others stand for other trade-offs, which a race by accuracy would decide between."""
    space = space_of(tmp_path, TWO)
    seconds = [0.02, 0.02, 0.004, 0.02, 0.02, 0.03, 0.003, 0.02]  # 2 is good and fast
    trials = [with_seconds(trial, s) for trial, s in zip(search(space), seconds, strict=True)]
    trials[2] = with_seconds(trials[2], 0.004)
    plan = plan_confirmation(space, trials)
    assert {run.number for run in plan.runs} == {0, 2} and plan.notes == ()
    alone = plan_confirmation(space_of(tmp_path), trials)
    assert {5, 2, 7} <= {run.number for run in alone.runs}


def test_a_default_configuration_that_is_chosen_has_nobody_to_race(tmp_path: Path) -> None:
    space = space_of(tmp_path, TWO)
    slower = with_seconds(record(space, 1, 0.4, lr_mp=0.01), 0.02)
    plan = plan_confirmation(space, [with_seconds(record(space, 0, 0.5), 0.01), slower])
    assert plan.runs == ()
    assert plan.notes == ("nothing to confirm: the chosen configuration is the default one",)
