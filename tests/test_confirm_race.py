"""The simulated searches that the race is measured by."""

import numpy as np
import pytest

from benchmarks.confirm_race import KINDS, World, describe, fixed, race, recorded_noise


def test_the_noise_is_that_of_the_recorded_runs() -> None:
    noise = recorded_noise()
    assert noise.num_questions == 1224
    assert 0.77 < noise.default < 0.85
    assert 0.1 < noise.deviation < 0.4
    assert 0.3 < noise.common < 0.9
    assert 0.5 < noise.other < noise.same < 0.95


def test_runs_lie_around_what_is_expected_of_a_configuration() -> None:
    world = World(None, seed=3)
    for number in (0, world.ranked[0]):
        accuracies = [world.run(number, seed_round).mean() for seed_round in range(60)]
        error = np.std(accuracies, ddof=1) / 60**0.5
        assert np.mean(accuracies) == pytest.approx(world.expected(number), abs=4 * error)
        assert (world.run(number, 0) == World(None, seed=3).run(number, 0)).all()


def test_both_rules_see_the_same_search_and_the_same_runs() -> None:
    world = World(0.03, seed=1)
    before, now = fixed(1, 2)(world), race(top=1, runs=4)(world)
    assert (before.num_runs, before.regret, before.error) == (now.num_runs, now.regret, now.error)
    assert world.truths[1:].max() - world.truths[0] == pytest.approx(0.03)
    assert len(set(World(KINDS["all are equal"], seed=1).truths)) == 1


def test_a_line_has_the_means() -> None:
    outcomes = [race()(World(None, seed)) for seed in range(3)]
    line = describe("race", outcomes)
    assert line.startswith("race ") and " 8.0 runs " in line
    assert f"beats {100 * np.mean([o.beats for o in outcomes]):5.1f} %" in line
