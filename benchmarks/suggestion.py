"""How long a suggestion of the sampler `auto` takes, with and without an earlier search.

    python benchmarks/suggestion.py                  # 300 trials in either search, 7 keys

A third of the trials has come to the second milestone and a ninth to the end. Time is that of a
processor, so that other programs do not count.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from nanovlm.samplers.history import CURVE, SOURCE
from nanovlm.samplers.milestone_sampler import MilestoneSampler

SPACE: dict[str, BaseDistribution] = {f"key{place}": FloatDistribution(0, 1) for place in range(7)}
FULL, MILESTONES = 900, (100, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for num_earlier in (0, arguments.trials):
        study = make_study(arguments.trials, num_earlier)
        seconds = [suggest(study, seed) for seed in range(arguments.rounds)]
        print(
            f"{arguments.trials} trials, {num_earlier} of an earlier search: median "
            f"{statistics.median(seconds):.3f} s of a processor, most {max(seconds):.3f} s"
        )


def make_study(num_trials: int, num_earlier: int) -> optuna.Study:
    """Return a study with so many trials of this search and of an earlier one."""
    study = optuna.create_study(direction="maximize")
    random = np.random.default_rng(0)
    for number in range(num_trials + num_earlier):
        params = {key: float(random.random()) for key in SPACE}
        value = -sum((each - 0.3) ** 2 for each in params.values()) + 0.05 * random.normal()
        ends = (*MILESTONES, FULL)[: 1 + (number % 3 == 0) + (number % 9 == 0)]
        curve = {samples: value - FULL / samples / 9 for samples in ends}
        earlier = {SOURCE: "earlier", CURVE: [(s / FULL, v) for s, v in curve.items()]}
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED,
                value=value,
                params=params,
                distributions=SPACE,
                intermediate_values=curve,
                user_attrs=earlier if number < num_earlier else {},
            )
        )
    return study


def suggest(study: optuna.Study, seed: int) -> float:
    """Return the seconds that a suggestion takes."""
    sampler = MilestoneSampler(
        seed,
        maximize=True,
        milestones=MILESTONES,
        reduction_factor=3,
        independent=RandomSampler(seed=seed),
    )
    trial = study.ask()
    started = time.process_time()
    sampler.sample_relative(study, study.trials[trial.number], SPACE)
    seconds = time.process_time() - started
    study.tell(trial, state=TrialState.FAIL)
    return seconds


if __name__ == "__main__":
    main()
