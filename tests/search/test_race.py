"""Who runs on which fresh seed, and when a race is over."""

import random
from collections.abc import Callable, Mapping

import pytest

from nanovlm.config.search_settings import Confirm
from nanovlm.results.statistics import paired_interval
from nanovlm.search.confirm import Race, Run, most_batches

Values = Callable[[int, int], float | None]


def race_of(num_candidates: int = 6, default: int | None = 0, **confirm: int) -> Race:
    return Race.between(range(1, num_candidates + 1), default, Confirm(**confirm))


def run_race(
    race: Race, values: Values, slots: int = 1, rng: random.Random | None = None
) -> dict[Run, float | None]:
    """Return the results in the order in which they came; with `rng` runs end in any order."""
    results = dict[Run, float | None]()
    under_way = list[Run]()
    while True:
        wanted = race.next_runs(results)
        under_way += [run for run in wanted if run not in under_way][: slots - len(under_way)]
        if not under_way:
            assert not wanted
            return results
        ended = under_way.pop(rng.randrange(len(under_way)) if rng else 0)
        results[ended] = values(*ended)


def noise(seed: int, spread: float = 1.0, failures: float = 0.0) -> Values:
    def value(number: int, seed_round: int) -> float | None:
        rng = random.Random(f"{seed} {number} {seed_round}")
        return None if rng.random() < failures else rng.gauss(0, spread)

    return value


def table(values: Mapping[int, tuple[float | None, ...]]) -> Values:
    return lambda number, seed_round: values[number][seed_round]


def numbers_by_round(results: Mapping[Run, float | None]) -> list[list[int]]:
    rounds = 1 + max(seed_round for _, seed_round in results)
    return [sorted(n for n, r in results if r == seed_round) for seed_round in range(rounds)]


def test_three_race_the_default_one_and_the_best_of_them_goes_on_with_it() -> None:
    values = table({0: (0, 1, 2), 1: (5,), 2: (7, 8, 7), 3: (6,)})
    results = run_race(race_of(), values)
    assert list(results) == [
        (1, 0), (0, 0), (2, 0), (3, 0), (2, 1), (0, 1), (2, 2), (0, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("confirm", "fields"),
    [
        ({}, [3, 1, 1]),
        ({"top": 3, "seeds": 2}, [3, 1, 1]),
        ({"top": 1, "seeds": 2}, [1, 1]),
        ({"seeds": 1}, [1, 1]),
        ({"top": 1}, [1, 1, 1, 1]),
        ({"runs": 2}, [1]),
        ({"runs": 3}, [1]),
        ({"runs": 7}, [2, 1, 1]),
        ({"runs": 11}, [6, 1, 1]),
        ({"runs": 13}, [6, 1, 1, 1]),
        ({"runs": 18}, [6, 2, 1, 1, 1, 1]),
        ({"runs": 24}, [6, 3, 1, 1, 1, 1, 1, 1]),
        ({"runs": 20, "top": 2}, [2, *[1] * 8]),
    ],
)
def test_the_worse_half_drops_out_and_the_best_keeps_three_seeds(
    confirm: dict[str, int], fields: list[int]
) -> None:
    results = run_race(race_of(**confirm), lambda number, seed_round: 0.0)
    assert [len(numbers) - 1 for numbers in numbers_by_round(results)] == fields
    assert all(0 in numbers for numbers in numbers_by_round(results))


def test_a_space_of_few_configurations_has_few_to_race() -> None:
    assert numbers_by_round(run_race(race_of(1), lambda *_: 0.0)) == [[0, 1]] * 4
    assert race_of(0).next_runs({}) == ()


@pytest.mark.parametrize("seed", range(30))
def test_never_more_runs_than_the_budget_and_the_same_ones_however_many_run_at_once(
    seed: int,
) -> None:
    rng = random.Random(seed)
    confirm = {"top": rng.randint(1, 8), "runs": rng.randint(2, 24)}
    race = race_of(rng.randint(1, 8), rng.choice([0, 0, None]), **confirm)
    values = noise(seed)
    alone = run_race(race, values)
    assert len(alone) <= confirm["runs"]
    for slots in (2, 3, 50):
        assert run_race(race, values, slots, rng) == alone


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_fail_cost_no_more_than_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    race = race_of(runs=rng.randint(2, 24))
    for slots in (1, 2, 50):
        results = run_race(race, noise(seed, failures=0.3), slots, rng)
        assert 2 <= len(results) <= race.most_runs


@pytest.mark.parametrize("seed", range(20))
def test_a_race_goes_on_at_any_point_with_the_runs_that_would_have_followed(seed: int) -> None:
    race = race_of(runs=8 + seed)
    whole = run_race(race, noise(seed, failures=0.05))
    order = list(whole)
    for num_done in range(len(order) + 1):
        results = {run: whole[run] for run in order[:num_done]}
        wanted = race.next_runs(results)
        assert wanted[:1] == tuple(order[num_done : num_done + 1])
        assert set(wanted) <= set(order) - set(results)


def test_what_is_certain_stays_so() -> None:
    """Later results add runs and take none away, so none that has begun was in vain."""
    race, values = race_of(runs=16), noise(1)
    results = dict[Run, float | None]()
    promised = set[Run]()
    while wanted := race.next_runs(results):
        assert promised <= {*wanted, *results}
        promised |= {*wanted}
        results[wanted[-1]] = values(*wanted[-1])
    assert promised == set(results)


def test_idle_slots_have_the_runs_that_no_result_can_spare() -> None:
    assert race_of(top=1, runs=8).next_runs({}) == (
        (1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)
    )  # fmt: skip
    # The fourth pair is not needed where three are enough, so it is not certain.
    assert most_batches(race_of(top=1, runs=8), slots=8) == (8, 2)
    assert most_batches(race_of(), slots=8) == (8, 2)
    assert most_batches(race_of(), slots=1) == (8, 8)


def test_a_clear_gain_ends_the_race_and_one_that_is_not_takes_all_runs() -> None:
    values = {0: (0.80, 0.81, 0.79, 0.80), 1: (0.97, 0.975, 0.972, 0.97)}
    assert len(run_race(race_of(top=1, runs=8), table(values))) == 6
    values[0] = (0.80, 0.95, 0.79, 0.80)
    assert len(run_race(race_of(top=1, runs=8), table(values))) == 8


def test_a_default_one_that_is_clearly_better_ends_the_race_too() -> None:
    values = table({0: (0.97, 0.975, 0.972), 1: (0.80, 0.81, 0.79)})
    assert len(run_race(race_of(top=1, runs=8), values)) == 6


def test_who_is_equal_uses_all_runs() -> None:
    assert len(run_race(race_of(runs=16), lambda number, seed_round: seed_round / 10)) == 15


def test_of_equal_ones_the_better_of_the_search_goes_on() -> None:
    race = Race((5, 2, 7), 0, 8)
    assert numbers_by_round(run_race(race, lambda *_: 0.0)) == [[0, 2, 5, 7], [0, 5], [0, 5]]


def test_what_the_search_knows_in_full_counts_as_a_seed_in_the_choice_and_not_in_the_verdict() -> (
    None
):
    values = table({0: (0, 0, 0), 1: (4, 4, 4), 2: (5, 5, 5), 3: (6, 6, 6)})
    searched = {1: 9.0, 2: 5.0}  # the third one did not run in full
    race = Race.between(range(1, 7), 0, Confirm(), searched)
    assert numbers_by_round(run_race(race, values))[1:] == [[0, 1], [0, 1]]
    alone = Race.between([1], 0, Confirm(runs=8), {1: 1e9})
    assert len(run_race(alone, lambda number, seed_round: seed_round * number)) == 8


def test_who_fails_drops_out() -> None:
    values = table({0: (0, 0, 0), 1: (None,), 2: (3, 3, 3), 3: (2,)})
    assert numbers_by_round(run_race(race_of(), values))[1:] == [[0, 2], [0, 2]]
    values = table({0: (0, 0, 0), 1: (5, None), 2: (3,), 3: (2,)})
    assert (1, 2) not in run_race(race_of(), values)


def test_a_failed_run_of_the_default_one_leaves_a_pair_less_to_judge_by() -> None:
    """Two pairs would be clear by themselves, but are too few."""
    values = table({0: (0.80, None, 0.80, 0.8), 1: (0.97, 0.97, 0.97, 0.97)})
    assert len(run_race(race_of(top=1, runs=8), values)) == 8


def test_without_the_default_one_the_race_ends_with_one_left() -> None:
    values = table({1: (5, 5), 2: (7, 7, 7), 3: (6, 9, 9), 4: (0,), 5: (0,), 6: (0,)})
    results = run_race(race_of(default=None, runs=12), values)
    assert numbers_by_round(results) == [[1, 2, 3, 4, 5, 6], [1, 2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("confirm", "rate"),
    [({}, 0.04), ({"top": 1}, 0.04), ({"runs": 16}, 0.05), ({"runs": 24}, 0.06)],
)
def test_of_searches_without_a_better_one_few_end_with_one(
    confirm: dict[str, int], rate: float
) -> None:
    """At most 6 of 100, whatever the looks and the choice."""
    race, num_searches, num_beaten = race_of(**confirm), 300, 0
    for seed in range(num_searches):
        values, results = noise(seed), dict[Run, float | None]()
        while wanted := race.next_runs(results):
            results |= {run: values(*run) for run in wanted}
        seeds_of = {n: [r for m, r in results if m == n] for n in race.candidates}
        best = max(race.candidates, key=lambda n: len(seeds_of[n]))
        gains = [(results[best, r] or 0.0) - (results[0, r] or 0.0) for r in seeds_of[best]]
        interval = paired_interval(gains)
        num_beaten += interval is not None and interval[0] > 0
    assert num_beaten <= rate * num_searches + 2 * (rate * num_searches) ** 0.5
