"""Which runs confirm a search: configurations, seeds, order, and the questions they are asked."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config_files import config_values
from nanovlm.errors import UserError
from nanovlm.messages import Kind, TrialRecord
from nanovlm.search.confirm_plan import (
    ConfirmPlan,
    confirm_seeds,
    plan_confirmation,
    with_holdout,
)
from nanovlm.search.space import SearchSpace, load_space
from tests.records import make_record, make_report

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
    space: SearchSpace, number: int, value: float | None, state: Any = "completed", **changes: Any
) -> TrialRecord:
    """Return a trial as it is read from `trials.jsonl`; a full one has reported twice."""
    metrics = {} if value is None else {space.objective.metric: value}
    num_reports = {"failed": 0, "stopped": 1, "completed": 2}[state]
    parameters = space.default_values() | changes
    config = json.loads(json.dumps(config_values(space.config_for(parameters))))
    return make_record(
        number,
        state,
        parameters=parameters,
        config=config,
        reports=[make_report(100, metrics)] * num_reports,
        reason="out of memory" if state == "failed" else None,
    )


def search(space: SearchSpace) -> list[TrialRecord]:
    """Return trials in the order of their end; 5, 2, 7 and 1 are the best of full length."""
    return [
        record(space, 1, 0.60, lr_mp=0.01),
        record(space, 0, 0.50),
        record(space, 2, 0.80, lr_mp=0.02),
        record(space, 3, 0.99, "stopped", lr_mp=0.03),
        record(space, 4, None, "failed", lr_mp=0.04),
        record(space, 5, 0.90, lr_mp=0.05),
        record(space, 6, 0.10, lr_mp=0.06),
        record(space, 7, 0.70, lr_mp=0.07),
    ]


def ended(plan: ConfirmPlan, state: Any = "completed") -> list[TrialRecord]:
    return [
        make_record(
            run.number,
            state,
            trial_id=run.trial_id,
            kind=Kind.CONFIRM,
            parameters=run.parameters,
            config=config_values(run.config),
        )
        for run in plan.runs
    ]


def numbers_and_seeds(plan: ConfirmPlan) -> list[tuple[int, int]]:
    return [(run.number, run.seed) for run in plan.runs]


def test_the_best_and_the_default_one_seed_by_seed_the_most_important_first(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    plan = plan_confirmation(space, search(space))
    order = (5, 0, 2, 7)
    assert numbers_and_seeds(plan) == [(n, seed) for seed in (4, 5) for n in order]
    assert [run.trial_id for run in plan.runs[:2]] == ["confirm-5-seed-4", "confirm-0-seed-4"]
    assert plan.notes == ()


def test_a_run_differs_from_its_trial_in_the_seed_alone(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    for run in plan_confirmation(space, search(space)).runs:
        values = {"lr_mp": 0.01 * run.number} if run.number else {}
        trial = space.config_for(space.default_values() | values)
        assert dataclasses.replace(run.config, seed=3, lr_mp=trial.lr_mp) == trial
        assert run.config.lr_mp == pytest.approx(trial.lr_mp)
        assert run.config.seed == run.seed
        assert run.parameters.keys() == {"lr_mp", "batch_size"}


def test_until_three_have_run_in_full_values_of_the_milestone_before_decide(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    records = [
        record(space, 0, 0.50),
        record(space, 1, 0.60, lr_mp=0.01),  # got far as one of the first
        record(space, 2, 0.80, "stopped", lr_mp=0.02),
        record(space, 3, 0.70, "stopped", lr_mp=0.03),
    ]
    runs = plan_confirmation(space, records).runs
    assert [run.number for run in runs if run.seed == 4] == [2, 0, 3, 1]


def test_the_number_of_runs_is_as_asked(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.top": 1, "confirm.seeds": 3})
    plan = plan_confirmation(space, search(space))
    assert numbers_and_seeds(plan) == [(n, seed) for seed in (4, 5, 6) for n in (5, 0)]
    nothing = space_of(tmp_path, {"confirm.top": 0})
    assert plan_confirmation(nothing, search(nothing)) == ConfirmPlan(runs=(), notes=())


def test_the_lowest_value_is_best_where_that_is_the_objective(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, {"objective.metric": "val_loss", "objective.mode": "min", "confirm.top": 2}
    )
    assert [run.number for run in plan_confirmation(space, search(space)).runs[:3]] == [6, 0, 1]


def test_trials_that_are_one_configuration_count_once(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.seeds": 1})
    again = [
        record(space, 8, 0.9, lr_mp=0.05),
        record(space, 9, 0.95, lr_mp=0.02),
        record(space, 10, 0.97),  # the default one
    ]
    plan = plan_confirmation(space, search(space) + again)
    assert [run.number for run in plan.runs] == [9, 0, 5, 7]


def test_a_searched_seed_is_replaced_by_one_that_no_trial_can_have_had(tmp_path: Path) -> None:
    text = "preset: digits\nsearch: {lr_mp: default, seed: {int: [0, 9]}}"
    space = space_of(tmp_path, {"confirm.top": 2}, text)
    trials = [
        record(space, 0, 0.5),
        record(space, 1, 0.8, lr_mp=0.02, seed=9),
        record(space, 2, 0.9, lr_mp=0.02, seed=4),
        record(space, 3, 0.7, lr_mp=0.03, seed=4),
        record(space, 4, 0.95, seed=7),  # the default configuration with another seed
    ]
    plan = plan_confirmation(space, trials)
    assert numbers_and_seeds(plan) == [(n, seed) for seed in (10, 11) for n in (2, 0, 3)]
    assert all(run.config.seed == run.seed for run in plan.runs)
    assert all(run.parameters.keys() == {"lr_mp"} for run in plan.runs)


def test_the_seeds_do_not_depend_on_what_has_ended(tmp_path: Path) -> None:
    text = "preset: digits\nsearch: {lr_mp: default, seed: {choice: [2, 50, 7]}}\nbase: {seed: 2}"
    assert confirm_seeds(space_of(tmp_path, {"confirm.seeds": 3}, text)) == (51, 52, 53)


def test_the_default_one_is_run_though_it_was_stopped_or_never_ended(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.seeds": 1, "confirm.top": 1})
    others = [trial for trial in search(space) if trial.number]
    for trials in (others, [record(space, 0, 0.2, "stopped"), *others]):
        plan = plan_confirmation(space, trials)
        assert [run.number for run in plan.runs] == [5, 0]
        assert plan.runs[1].config == dataclasses.replace(space.base, seed=4)
        assert plan.runs[1].parameters == space.default_values()
        assert plan.notes == ()


def test_a_default_one_that_failed_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"confirm.seeds": 1})
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


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    plan = plan_confirmation(space, search(space))
    done = ended(plan)
    for number in range(len(done) + 1):
        rest = plan_confirmation(space, search(space), done[:number])
        assert rest.runs == plan.runs[number:]
    failed = plan_confirmation(space, search(space), ended(plan, "failed")[:3])
    assert failed.runs == plan.runs[3:]


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
