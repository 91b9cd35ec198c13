"""The rules of a search whose trials pause: who waits, who goes on, who ends."""

import math
import random
from pathlib import Path

import pytest

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.results.decisions import PruningDecision

MILESTONES = (100, 300, 900)


def rungs_of(log: Path | None = None, mode: str = "max", factor: int = 3) -> PausingHalving:
    settings = Scheduler(type="pausing", rungs=4, reduction_factor=factor)
    objective = Objective.model_validate({"metric": "accuracy", "mode": mode})
    return PausingHalving(settings, MILESTONES, objective=objective, log=log)


def decide(
    rungs: PausingHalving, number: int, value: float, milestone: int = 100
) -> PruningDecision:
    return rungs.decide(number, milestone + 3, value)


def test_a_trial_waits_until_it_is_among_the_best_third() -> None:
    rungs = rungs_of()
    assert [decide(rungs, n, v).is_paused for n, v in enumerate([0.5, 0.7])] == [True, True]
    assert rungs.promote() is None
    third = decide(rungs, 2, 0.6)
    assert third.is_paused and not third.goes_on
    assert third.reason == (
        "accuracy 0.6 is number 2 of 3 trials at 100 samples, of which the best 1 go on"
    )
    promoted = rungs.promote()
    assert promoted is not None and (promoted.number, promoted.goes_on) == (1, True)
    assert promoted.reason == "accuracy 0.7 is number 1 of 3 trials at 100 samples"
    assert rungs.promote() is None and set(rungs.paused) == {0, 2}


def test_the_best_goes_on_at_once() -> None:
    rungs = rungs_of()
    for number, value in enumerate([0.1, 0.2]):
        decide(rungs, number, value)
    decision = decide(rungs, 2, 0.3)
    assert decision.goes_on and not decision.is_paused
    assert 2 not in rungs.paused


def test_the_highest_milestone_comes_first() -> None:
    rungs = rungs_of()
    for number in range(9):
        decide(rungs, number, 0.9 - number / 10)
    for number in range(3):
        promoted = rungs.promote()
        assert promoted is not None and promoted.number == number
    for number, value in ((2, 0.4), (1, 0.6), (0, 0.5)):
        decide(rungs, number, value, 300)
    for number in range(9, 12):
        decide(rungs, number, 0.0)  # four may go on from the first milestone now
    for milestone, number in ((300, 1), (100, 3)):
        promoted = rungs.promote()
        assert promoted is not None
        assert (promoted.milestone, promoted.number) == (milestone, number)


def test_less_is_better_where_the_mode_says_so() -> None:
    rungs = rungs_of(mode="min")
    for number, value in enumerate([0.2, 0.5, 0.9]):
        decide(rungs, number, value)
    promoted = rungs.promote()
    assert promoted is not None and promoted.number == 0


def test_of_equal_trials_the_earlier_one_goes_on() -> None:
    rungs = rungs_of()
    for number in (2, 0, 1):
        decide(rungs, number, 0.5)
    promoted = rungs.promote()
    assert promoted is not None and promoted.number == 0


def test_a_search_of_few_trials_has_one_of_full_length() -> None:
    """Of two trials none is the best third, so at the end of the search the third is rounded up."""
    rungs = rungs_of()
    decide(rungs, 0, 0.5)
    decide(rungs, 1, 0.4)
    for milestone in MILESTONES[1:]:
        assert rungs.promote() is None
        promoted = rungs.promote(is_last=True)
        assert promoted is not None and promoted.number == 0
        decide(rungs, 0, 0.6, milestone)
    promoted = rungs.promote(is_last=True)
    assert promoted is not None and promoted.milestone == 900


def test_the_hopeless_end_early_and_the_others_at_the_end() -> None:
    rungs = rungs_of()
    for number in range(8):
        decide(rungs, number, 0.8 - number / 10)
    ended = rungs.end_hopeless(most_trials=9)
    assert [decision.number for decision in ended] == [
        6,
        7,
    ]  # 3 go on, 3 are in reserve
    assert ended[0].reason == (
        "accuracy 0.2 is number 7 of 8 trials at 100 samples, too far behind the best 3 of 9"
    )
    assert not ended[0].goes_on and not ended[0].is_paused
    assert rungs.end_hopeless(most_trials=9) == []
    assert {decision.number for decision in rungs.end_all()} == set(range(6))
    assert not rungs.paused


def test_a_failed_trial_leaves_no_value_behind(tmp_path: Path) -> None:
    rungs = rungs_of(tmp_path / "log")
    for number, value in enumerate([0.9, 0.5, 0.4]):
        decide(rungs, number, value)
    promoted = rungs.promote()
    assert promoted is not None and promoted.number == 0
    rungs.withdraw(0)
    decide(rungs, 3, 0.3)
    for again in (rungs, rungs_of(tmp_path / "log")):
        promoted = again.promote()
        assert promoted is not None and promoted.number == 1


def test_the_least_promising_states_are_let_go() -> None:
    rungs = rungs_of()
    for number in range(6):
        decide(rungs, number, 0.6 - number / 10)
    assert rungs.least_promising(None) == rungs.least_promising(6) == []
    assert rungs.least_promising(4) == [4, 5]
    assert (promoted := rungs.promote()) is not None and promoted.number == 0
    assert rungs.least_promising(4) == [5]


def test_a_milestone_that_says_nothing_does_not_decide() -> None:
    rungs = rungs_of()
    number = 0
    while rungs.rank_correlation(100) is None:
        decision = decide(rungs, number, random.Random(number).random())
        promoted = decision if decision.goes_on else rungs.promote()
        if promoted is not None:  # the better it was, the worse it is
            decide(rungs, promoted.number, -promoted.value, 300)
        number += 1
        assert number < 100
    assert rungs.rank_correlation(100) == -1.0
    waiting = set(rungs.paused)
    decision = decide(rungs, number, -1.0)
    assert decision.goes_on and decision.reason == (
        "accuracy at 100 samples says nothing of that at 300: rank correlation -1.00"
    )
    promoted = rungs.promote()
    assert promoted is None or promoted.milestone == 300
    assert waiting - {promoted and promoted.number} <= set(rungs.paused)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_it_is_remembered(tmp_path: Path, seed: int) -> None:
    """A random search, whose program is killed after any event."""
    random_ = random.Random(seed)
    log = tmp_path / "rungs.jsonl"
    rungs, undisturbed = rungs_of(log), rungs_of()
    reached: dict[int, int] = {}  # number -> milestones, of trials under way
    num_begun = 0
    for _ in range(120):
        if random_.random() < 0.3:
            rungs = rungs_of(log)
        if reached and random_.random() < 0.7:
            number = random_.choice(sorted(reached))
            if random_.random() < 0.05:
                for each in (rungs, undisturbed):
                    each.withdraw(number)
                del reached[number]
                continue
            value = round(random_.random(), 1)
            ours, theirs = (
                decide(each, number, value, MILESTONES[reached[number]])
                for each in (rungs, undisturbed)
            )
            assert ours == theirs
            assert ours.goes_on != ours.is_paused
            assert ours == decide(rungs, number, 99.0, ours.milestone), "a report that is repeated"
            if ours.is_paused or reached[number] == 2:
                reached.pop(number)
            else:
                reached[number] += 1
        promoted = rungs.promote()
        assert promoted == undisturbed.promote()
        if promoted is None:
            reached[num_begun] = 0
            num_begun += 1
        elif promoted.milestone < MILESTONES[-1]:
            reached[promoted.number] = MILESTONES.index(promoted.milestone) + 1
        assert rungs.paused == undisturbed.paused
        assert not set(rungs.paused) & set(reached)
        _check_waiting(rungs)


def _check_waiting(rungs: PausingHalving) -> None:
    """Nobody waits who is among the best third of a milestone."""
    for milestone, rung in rungs._rungs.items():
        best = rung.numbers(0, math.floor(len(rung) / 3))
        waiting = {n for n, decision in rungs.paused.items() if decision.milestone == milestone}
        assert not waiting & {*best[:1]}


def test_after_an_interruption_only_those_wait_that_have_paused(tmp_path: Path) -> None:
    log = tmp_path / "rungs.jsonl"
    first = rungs_of(log)
    for number, value in enumerate([0.5, 0.7, 0.3]):
        decide(first, number, value)
    waits = decide(first, 3, 0.4)  # killed before it was acted upon
    again = rungs_of(log)
    again.keep_waiting(waiting={0, 1}, ended={2})
    assert set(again.paused) == {0, 1}
    promoted = again.promote()
    assert promoted is not None and promoted.number == 1, "of the three trials that are known"
    assert decide(again, 3, 0.4) == waits, "as before: trial 2 still counts"
    assert set(again.paused) == {0, 3}
    third = rungs_of(log)
    ranks = [{m: rung.numbers() for m, rung in each._rungs.items()} for each in (third, again)]
    assert ranks[0] == ranks[1] and third._decisions == again._decisions
    assert set(third.paused) == {0, 2, 3}
