"""What the sampler learns from earlier searches of other lengths, and how much."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from nanovlm.samplers.history import CURVE, SOURCE
from nanovlm.samplers.milestone_sampler import CORRELATIONS, MilestoneSampler

SPACE: Mapping[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 1.0),
    "warmup": FloatDistribution(0.0, 1.0),
}
DEFAULT = {"rate": 2e-4, "decay": 0.9, "warmup": 0.9}

Score = Callable[[Mapping[str, Any]], float]


def score(params: Mapping[str, Any]) -> float:
    """Best, 0, at rate 1e-2 and decay 0.3; the warm-up does not matter."""
    return -((math.log10(params["rate"]) + 2) ** 2) - 4 * (params["decay"] - 0.3) ** 2


def opposite(params: Mapping[str, Any]) -> float:
    return -score(params)


def study_after(older: Score | None, seed: int, level: float = 0.0, spread: float = 1.0) -> Any:
    """Return a study with 20 random trials of an earlier search, half of them short."""
    study = optuna.create_study(direction="maximize")
    if older is None:
        return study
    drawn = optuna.create_study(sampler=RandomSampler(seed=seed))
    for number in range(20):
        params = drawn.ask(dict(SPACE)).params
        value = level + spread * older(params)
        curve = [(1 / 3, value - spread)] + [(1.0, value)] * (number % 2)
        trial = optuna.trial.create_trial(
            state=TrialState.PRUNED,
            value=value,
            params=params,
            distributions=dict(SPACE),
            intermediate_values={30: value},
            user_attrs={SOURCE: "older", CURVE: curve},
        )
        study.add_trial(trial)
    return study


class Together(MilestoneSampler):
    """Draws all keys together from the start, as a search lets it."""

    def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> dict[str, Any]:
        return dict(SPACE)


def suggest(study: optuna.Study, seed: int) -> optuna.Trial:
    """Begin a trial; the first one of this search is the default one."""
    if all(SOURCE in trial.user_attrs for trial in study.trials):
        study.enqueue_trial(DEFAULT)
    study.sampler = Together(
        seed,
        maximize=True,
        milestones=(100, 300),
        reduction_factor=3,
        independent=RandomSampler(seed=seed),
    )
    return study.ask(dict(SPACE))


def finish(study: optuna.Study, trial: optuna.Trial) -> float:
    value = score(trial.params)
    for samples, lacks in ((100, 2.0), (300, 1.0), (900, 0.0)):
        trial.report(value - lacks, samples)
    study.tell(trial, value)
    return value


def best_of(num: int, older: Score | None, seed: int) -> tuple[float, dict[str, float]]:
    """Return the best of so many trials, and what the sampler said of the earlier search last."""
    study = study_after(older, seed)
    values = [finish(study, suggest(study, seed * 100 + number)) for number in range(num)]
    return max(values), study.trials[-1].system_attrs.get(CORRELATIONS, {})


@pytest.mark.parametrize("level, spread", [(0.0, 1.0), (50.0, 0.01)], ids=["same", "other scale"])
def test_the_first_suggestion_is_the_best_that_an_earlier_search_knows(
    level: float, spread: float
) -> None:
    reached = []
    for seed in range(5):
        study = study_after(score, seed, level, spread)
        suggest(study, seed)  # the default one, which runs
        reached.append(score(suggest(study, seed + 50).params))
    assert score(DEFAULT) < -4
    assert np.median(reached) > -0.15 and min(reached) > -0.5


def test_an_earlier_search_makes_this_one_shorter() -> None:
    with_it, without = ([best_of(4, older, seed) for seed in range(5)] for older in (score, None))
    assert np.median([best for best, _ in with_it]) > -0.02
    assert np.median([best for best, _ in without]) < -0.1
    assert not without[0][1], "nothing is told where there is nothing"


@pytest.mark.parametrize("older, low, high", [(score, 0.7, 1), (opposite, -1, -0.7)])
def test_how_well_an_earlier_search_foresaw_the_trials_is_noted(
    older: Score, low: float, high: float
) -> None:
    assert low < best_of(10, older, seed=0)[1]["older"] <= high
    assert best_of(5, older, seed=0)[1] == {}, "too few values to tell"


@pytest.mark.parametrize("kind", ["noise", "opposite", "another"])
def test_an_earlier_search_that_tells_nothing_does_little_harm(kind: str) -> None:
    random = np.random.default_rng(0)
    scores: dict[str, Score] = {
        "noise": lambda params: random.normal(),
        "opposite": opposite,
        "another": lambda params: -abs(params["warmup"] - 0.5),
    }
    found = [best_of(12, scores[kind], seed)[0] for seed in range(3)]
    without = [best_of(12, None, seed)[0] for seed in range(3)]
    assert np.median(found) > np.median(without) - 0.4, "of the 4 that the default one lacks"


def test_there_is_a_suggestion_though_the_default_configuration_failed() -> None:
    study = study_after(score, seed=0)
    study.tell(suggest(study, 0), state=TrialState.FAIL)
    assert score(suggest(study, 1).params) > -0.5
