"""The sampler that learns from unfinished trials, asked by Optuna itself."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from nanovlm.samplers.milestone_sampler import MilestoneSampler

SPACE: Mapping[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 1.0),
    "batch": IntDistribution(0, 2),
    "freeze": CategoricalDistribution(("none", "encoder")),
}


def score(params: Mapping[str, Any], samples: int = 900) -> float:
    """Best, 1 in full, at rate 1e-2 and decay 0.3 with the middle batch and nothing frozen."""
    off = (math.log10(params["rate"]) + 2) ** 2 + (params["decay"] - 0.3) ** 2
    off += 0.2 * abs(params["batch"] - 1) + 0.3 * (params["freeze"] != "none")
    return math.log(samples, 900) - off


def sampler_of(seed: int) -> MilestoneSampler:
    return MilestoneSampler(
        seed,
        maximize=True,
        milestones=(100, 300),
        reduction_factor=3,
        independent=RandomSampler(seed=seed),
    )


def ask(study: optuna.Study, number: int) -> optuna.Trial:
    study.sampler = sampler_of(number)
    relative = study.sampler.sample_relative(study, study.trials[-1], dict(SPACE)) if number else {}
    return study.ask(dict(SPACE)) if not relative else _enqueued(study, relative)


def _enqueued(study: optuna.Study, params: dict[str, Any]) -> optuna.Trial:
    study.enqueue_trial(params)
    return study.ask(dict(SPACE))


def search(num: int, finish: Callable[[optuna.Study, optuna.Trial], None]) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for number in range(num):
        finish(study, ask(study, number))
    return study


def complete(study: optuna.Study, trial: optuna.Trial) -> None:
    for samples in (100, 300, 900):
        trial.report(score(trial.params, samples), samples)
    study.tell(trial, score(trial.params))


def wait(study: optuna.Study, trial: optuna.Trial) -> None:
    trial.report(score(trial.params, 100), 100)


@pytest.mark.parametrize("finish", [complete, wait], ids=["in full", "waiting"])
def test_it_learns_wherever_trials_are(
    finish: Callable[[optuna.Study, optuna.Trial], None],
) -> None:
    trials = search(25, finish).get_trials(deepcopy=False)
    scores = [score(trial.params) for trial in trials]
    assert max(scores) > 0.9
    assert np.median(scores[-8:]) > max(scores[:4])


def test_it_gives_the_same_again() -> None:
    one, other = (search(10, complete) for _ in range(2))
    assert [t.params for t in one.trials] == [t.params for t in other.trials]


def test_trials_under_way_are_not_tried_again() -> None:
    study = search(8, complete)
    asked = [ask(study, number) for number in range(8, 12)]
    rates = sorted(math.log10(trial.params["rate"]) for trial in asked)
    keys = {(round(t.params["decay"], 1), t.params["batch"], t.params["freeze"]) for t in asked}
    assert len(keys) > 1 or max(np.diff(rates)) > 0.1


def test_it_learns_where_trials_are_infeasible() -> None:
    def fail_above(study: optuna.Study, trial: optuna.Trial) -> None:
        if trial.params["decay"] < 0.5:  # where the best ones are
            trial.set_constraint("feasible", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            complete(study, trial)

    decays = [trial.params["decay"] for trial in search(24, fail_above).trials]
    assert sum(decay < 0.5 for decay in decays[-12:]) <= 4
    assert min(decays[-12:]) < 0.6, "it comes near to the edge"
