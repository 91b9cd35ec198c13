"""What each kind of sampler is shown of the trials before."""

import random
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from nanovlm.samplers.history import BestAndLatest, OneBudget, WorstForInfeasible, looks_infeasible

X = {"x": FloatDistribution(0.0, 1.0)}


def trial(
    number: int,
    value: float | None,
    state: TrialState = TrialState.COMPLETE,
    steps: dict[int, float] | None = None,
    **more: Any,
) -> FrozenTrial:
    params = more.pop("params", {"x": 0.5})
    made = optuna.trial.create_trial(
        state=state,
        value=value,
        params=params,
        distributions=more.pop("distributions", X),
        intermediate_values=steps or {},
        **more,
    )
    made.number = number
    return made


def infeasible(number: int, **more: Any) -> FrozenTrial:
    return trial(number, None, TrialState.PRUNED, constraints={"feasible": 1.0}, **more)


def test_a_long_search_shows_tpe_the_best_the_latest_and_what_runs() -> None:
    draw = random.Random(0)
    trials = [trial(number, draw.random()) for number in range(600)]
    trials[3] = trial(3, None, TrialState.RUNNING)
    trials[5] = trial(5, None, TrialState.FAIL)
    history = BestAndLatest(maximize=True)
    for number in range(1, 601):  # as the search goes on
        shown = history(trials[:number])
        if number <= 250:
            assert shown == trials[:number]
    numbers = [t.number for t in shown]
    assert numbers == sorted(set(numbers))
    finished = [t for t in trials if t.state is TrialState.COMPLETE]
    best = sorted(finished, key=lambda t: -t.values[0])[:50]
    assert set(numbers) == {t.number for t in [*best, *finished[-200:]]} | {3}
    again = BestAndLatest(maximize=True)(trials)  # after an interruption
    assert [t.number for t in again] == numbers
    trials[3] = trial(3, 2.0)
    assert trials[3] in history(trials), "it has ended as the best"


def test_full_trials_are_better_for_tpe_than_stopped_ones_and_those_than_infeasible_ones() -> None:
    full = [trial(number, 0.1) for number in range(30)]
    far = [trial(30 + n, 0.2, TrialState.PRUNED, {100: 0.1, 300: 0.2}) for n in range(10)]
    near = [trial(40 + n, 0.9, TrialState.PRUNED, {100: 0.9}) for n in range(20)]
    out = [infeasible(60 + number) for number in range(40)]
    latest = [trial(100 + number, 0.5) for number in range(200)]
    shown = BestAndLatest(maximize=True)([*full, *far, *near, *out, *latest])
    # The best 50 of all are the latest and full ones; the rest has no place.
    assert [t.number for t in shown] == list(range(100, 300))
    shown = BestAndLatest(maximize=False)([*full, *far, *near, *out, *latest])
    assert {t.number for t in shown} >= set(range(30))


@pytest.mark.parametrize("maximize", [True, False])
def test_a_gaussian_process_sees_values_of_one_budget(maximize: bool) -> None:
    stopped = [trial(n, n / 10, TrialState.PRUNED, {100: n / 10}) for n in range(8)]
    further = [trial(8 + n, 0.9, TrialState.PRUNED, {100: 0.2, 300: 0.9}) for n in range(4)]
    running = trial(12, None, TrialState.RUNNING)
    shown = OneBudget(maximize)([*stopped, *further, running, infeasible(13)])
    values = [t.value for t in shown[:12]]
    assert values == [*(n / 10 for n in range(8)), *[0.2] * 4], "at 100, where enough have been"
    assert all(t.state is TrialState.COMPLETE and not t.constraints for t in shown[:13])
    assert shown[12].value == (0.0 if maximize else 0.7), "the worst"
    assert shown[13] is running
    full = [trial(20 + n, 0.5) for n in range(10)]
    assert [t.value for t in OneBudget(maximize)([*stopped, *full])] == [0.5] * 10


def test_a_gaussian_process_sees_nothing_before_the_first_value() -> None:
    running = trial(0, None, TrialState.RUNNING)
    assert OneBudget(True)([running, infeasible(1)]) == [running]


def test_cma_es_sees_the_worst_value_for_what_is_infeasible() -> None:
    trials = [trial(0, 0.4), infeasible(1), trial(2, 0.1, TrialState.PRUNED, {100: 0.1})]
    shown = WorstForInfeasible(maximize=True)(trials)
    assert [t.value for t in shown] == [0.4, 0.1, 0.1]
    assert WorstForInfeasible(maximize=True)(trials[1:2]) == trials[1:2]


def test_the_nearest_trial_tells_what_is_feasible() -> None:
    space = {
        "lr": FloatDistribution(1e-4, 1e-1, log=True),
        "batch": IntDistribution(0, 4),
        "kind": CategoricalDistribution(("a", "b")),
    }

    def at(lr: float, batch: int, kind: str) -> dict[str, Any]:
        return {"params": {"lr": lr, "batch": batch, "kind": kind}, "distributions": space}

    trials = [
        trial(0, 0.5, **at(1e-3, 1, "a")),
        infeasible(1, **at(1e-3, 4, "a")),
        trial(2, None, TrialState.RUNNING, **at(1e-3, 3, "a")),
    ]
    assert looks_infeasible({"lr": 1e-3, "batch": 3, "kind": "a"}, space, trials)
    assert not looks_infeasible({"lr": 1e-3, "batch": 2, "kind": "a"}, space, trials)
    trials[1] = infeasible(1, **at(1e-1, 1, "b"))
    assert looks_infeasible({"lr": 1e-1, "batch": 1, "kind": "b"}, space, trials)
    assert not looks_infeasible({"lr": 1e-1, "batch": 1, "kind": "a"}, space, trials)
    assert not looks_infeasible({"lr": 1e-1, "batch": 1, "kind": "b"}, space, trials[:1])
