"""What the confirming runs come to, from made-up runs and their answers."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from nanovlm.config.search_settings import Objective
from nanovlm.errors import UserError
from nanovlm.messages import End, Kind, TrialRecord
from nanovlm.results.conclusion import left_the_race
from nanovlm.results.confirmation import summarize_confirmation
from nanovlm.results.statistics import mcnemar_exact
from nanovlm.watch.terminal.tables import confirmation_table
from tests.records import make_record
from tests.results.answers import write_answers

ACCURACY = Objective(metric="mmstar_accuracy", mode="max")
VAL_LOSS = Objective(metric="val_loss", mode="min")
NUM_ITEMS = 612


def run(
    number: int,
    seed: int,
    metrics: dict[str, float],
    state: Any = "completed",
    **changes: Any,
) -> TrialRecord:
    return make_record(
        number,
        state,
        metrics,
        trial_id=f"confirm-{number}-seed-{seed}",
        kind=Kind.CONFIRM,
        parameters={"lr_mp": 0.01 * (number + 1)},
        config={"seed": seed, "mmstar_part": "all"} | changes.pop("config", {}),
        **changes,
    )


def failed(number: int, seed: int, end: End = End.ERROR) -> TrialRecord:
    return run(number, seed, {}, reason="NaN", end=end)


def searched(number: int, value: float, state: Any = "completed") -> TrialRecord:
    return make_record(number, state, {"mmstar_accuracy": value, "val_loss": value})


def answered(
    folder: Path, number: int, seed: int, right: Sequence[int], **changes: Any
) -> TrialRecord:
    """Return a run that has answered the questions `right` rightly, with its file of answers."""
    answers = {item: item in set(right) for item in range(NUM_ITEMS)}
    result = run(number, seed, {"mmstar_accuracy": len(right) / NUM_ITEMS}, **changes)
    write_answers(folder / f"{result.trial_id}.jsonl", answers)
    return result


def summarize(
    folder: Path, runs: Sequence[TrialRecord], objective: Objective = ACCURACY
) -> dict[str, Any]:
    """Return the summary as it is read from `summary.json`."""
    trials = [searched(0, 0.3, "stopped"), searched(7, 0.9), searched(9, 0.8)]
    summary = summarize_confirmation(runs, trials, objective, folder)
    content: dict[str, Any] = json.loads(json.dumps(summary, allow_nan=False))
    return content


def losses(number: int, *values: float) -> list[TrialRecord]:
    return [run(number, seed, {"val_loss": value}) for seed, value in enumerate(values, 10)]


def test_the_figures_of_a_configuration_and_its_difference_to_the_default(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, 7, 10, range(300)),
        answered(tmp_path, 0, 10, range(240)),
        answered(tmp_path, 7, 11, range(320)),
        answered(tmp_path, 0, 11, range(1, 260)),
    ]
    summary = summarize(tmp_path, runs)
    best, default = summary["configurations"]
    assert summary["winner"] == best["number"] == 7
    assert best["parameters"] == {"lr_mp": 0.08}
    assert best["runs"] == [
        {"trial_id": "confirm-7-seed-10", "seed": 10, "value": 300 / 612},
        {"trial_id": "confirm-7-seed-11", "seed": 11, "value": 320 / 612},
    ]
    assert best["mean"] == pytest.approx(310 / 612)
    assert best["standard_error"] == pytest.approx(10 / 612)
    assert (best["search_value"], default["search_value"]) == (0.9, None)  # it was stopped
    difference = best["difference_to_default"]
    assert difference["mean"] == pytest.approx((60 + 61) / 2 / 612)
    assert difference["seeds"] == [10, 11]
    assert difference["num_items"] == 612
    # Only 7: question 0 with one seed and 240 to 319 with one or two.
    assert (difference["only_this_right"], difference["only_default_right"]) == (81, 0)
    assert difference["p_value"] == mcnemar_exact(81, 0)
    assert default["difference_to_default"] is None
    # Values 10 apart and 19 apart / 612: squares 2 x 10^2 / 4 x ...
    assert summary["seed_degrees_of_freedom"] == 2
    deviation = ((10**2 * 2 + 9.5**2 * 2) / 2) ** 0.5 / 612
    assert summary["seed_deviation"] == pytest.approx(deviation)
    expected = stats.ttest_rel([300, 320], [240, 259]).confidence_interval(0.95)
    low, high = difference["seeds_interval_95"]
    assert (612 * low, 612 * high) == pytest.approx((expected.low, expected.high))
    assert best["race"] == {
        "last_seed": 11, "is_out": False, "behind_best": None, "is_clearly_behind": False
    }  # fmt: skip
    assert default["race"] is None


def test_no_runs_no_confirmation(tmp_path: Path) -> None:
    assert summarize_confirmation([], [searched(0, 0.5)], ACCURACY, tmp_path) is None


def test_the_best_mean_wins_and_not_the_best_run(tmp_path: Path) -> None:
    runs = losses(0, 0.50, 0.50) + losses(7, 0.10, 0.70) + losses(9, 0.31, 0.31)
    summary = summarize(tmp_path, runs, VAL_LOSS)
    assert [c["number"] for c in summary["configurations"]] == [9, 7, 0]
    assert summarize(tmp_path, runs, Objective(metric="val_loss", mode="max"))["winner"] == 0


def test_of_equal_means_the_default_one_wins(tmp_path: Path) -> None:
    summary = summarize(tmp_path, losses(7, 0.5) + losses(9, 0.5) + losses(0, 0.5), VAL_LOSS)
    assert [c["number"] for c in summary["configurations"]] == [0, 7, 9]
    assert summary["verdict"] == (
        "the default configuration is best: mean val_loss 0.5 over 1 seed; 3 runs could not tell "
        "trial 7 from trial 9"
    )


def test_a_clear_gain(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, 7, 10, range(300)),
        answered(tmp_path, 0, 10, range(280)),
        answered(tmp_path, 7, 11, range(302)),
        answered(tmp_path, 0, 11, range(281)),
    ]
    summary = summarize(tmp_path, runs)
    assert summary["gain_counts"]
    assert summary["verdict"] == (
        "trial 7 beats the default configuration by 3.3 points [2.0, 4.7] on 612 questions "
        "(p = 4.8e-07)"
    )


def test_held_out_questions_are_called_so(tmp_path: Path) -> None:
    config = {"config": {"mmstar_part": "holdout"}}
    runs = [answered(tmp_path, n, 10, range(100 + n), **config) for n in (0, 7)]
    assert "on 612 held-out questions" in summarize(tmp_path, runs)["verdict"]


def test_a_gain_that_other_questions_might_undo(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, 7, 10, range(20, 324)),
        answered(tmp_path, 0, 10, range(300)),
    ]
    summary = summarize(tmp_path, runs)
    assert not summary["gain_counts"]
    assert summary["verdict"] == (
        "the gain of trial 7 over the default configuration, 0.7 points [-1.5, 2.8] on 612 "
        "questions, is inside the noise (p = 0.65)"
    )


def test_a_gain_that_other_seeds_might_undo(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, 7, 10, range(380)),
        answered(tmp_path, 0, 10, range(250)),
        answered(tmp_path, 7, 11, range(250)),
        answered(tmp_path, 0, 11, range(300)),
    ]
    summary = summarize(tmp_path, runs)
    assert not summary["gain_counts"]
    verdict = summary["verdict"]
    assert "6.5 points [5.2, 7.9] on 612 questions (p = 1.7e-24)" in verdict
    assert "is inside the noise between seeds: [-" in verdict


def test_with_one_seed_that_is_said(tmp_path: Path) -> None:
    runs = [answered(tmp_path, n, 10, range(200 + 10 * n)) for n in (7, 0)]
    summary = summarize(tmp_path, runs)
    assert summary["configurations"][0]["standard_error"] is None
    assert summary["configurations"][0]["difference_to_default"]["seeds_interval_95"] is None
    assert summary["verdict"] == (
        "the gain of trial 7 over the default configuration, 11.4 points [8.9, 14.0] on 612 "
        "questions (p = 1.7e-21), may be noise between seeds: with one seed that is not known"
    )
    assert not summary["gain_counts"]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (
            (0.40, 0.42),
            "trial 7 beats the default configuration by 0.105 val_loss [0.0415, 0.169] over 2 "
            "seeds, not compared by questions",
        ),
        (
            (0.48, 0.50),
            "the gain of trial 7 over the default configuration, 0.025 val_loss [-0.0385, 0.0885] "
            "over 2 seeds, not compared by questions, is inside the noise",
        ),
    ],
)
def test_a_loss_is_compared_over_seeds_alone(
    tmp_path: Path, best: tuple[float, float], expected: str
) -> None:
    summary = summarize(tmp_path, losses(0, 0.50, 0.53) + losses(7, *best), VAL_LOSS)
    difference = summary["configurations"][0]["difference_to_default"]
    assert difference["mean"] < 0
    assert difference["p_value"] is difference["interval_95"] is difference["num_items"] is None
    assert summary["verdict"] == expected
    assert summary["gain_counts"] == (best == (0.40, 0.42))


def test_a_loss_with_one_seed_may_be_noise(tmp_path: Path) -> None:
    summary = summarize(tmp_path, losses(0, 0.5) + losses(7, 0.4), VAL_LOSS)
    assert not summary["gain_counts"]
    verdict = summary["verdict"]
    assert verdict.startswith("the gain of trial 7 over the default configuration, 0.1 val_loss")
    assert "over 1 seed, not compared by questions, may be noise" in verdict


def test_without_answers_the_seeds_are_compared(tmp_path: Path) -> None:
    runs = [answered(tmp_path, n, seed, range(200 + n)) for n in (7, 0) for seed in (10, 11)]
    (tmp_path / "confirm-0-seed-11.jsonl").unlink()
    difference = summarize(tmp_path, runs)["configurations"][0]["difference_to_default"]
    assert difference["p_value"] is None
    assert difference["seeds"] == [10, 11]


def test_only_seeds_that_both_have_finished_are_paired(tmp_path: Path) -> None:
    runs = [*losses(0, 0.5, 0.9), *losses(7, 0.4), failed(7, 11)]
    best = summarize(tmp_path, runs, VAL_LOSS)["configurations"][0]
    assert best["difference_to_default"]["seeds"] == [10]
    assert best["difference_to_default"]["mean"] == pytest.approx(-0.1)


def test_failed_runs_are_listed_and_have_no_mean(tmp_path: Path) -> None:
    runs = [*losses(0, 0.5, 0.5), failed(7, 10), failed(7, 11), *losses(9, 0.6), failed(9, 11)]
    summary = summarize(tmp_path, runs, VAL_LOSS)
    assert [c["number"] for c in summary["configurations"]] == [0, 9, 7]
    last = summary["configurations"][-1]
    assert (last["mean"], last["standard_error"], last["runs"]) == (None, None, [])
    assert last["difference_to_default"] is None
    assert last["failed"][1] == {"trial_id": "confirm-7-seed-11", "seed": 11, "reason": "NaN"}
    assert summary["verdict"].endswith("; 3 of 6 runs failed")


def test_a_configuration_that_a_seed_makes_fail_does_not_win(tmp_path: Path) -> None:
    runs = [*losses(0, 0.5, 0.5), *losses(7, 0.1), failed(7, 11, End.NOT_FINITE)]
    assert summarize(tmp_path, runs, VAL_LOSS)["winner"] == 0
    runs[-1] = failed(7, 11)  # by no fault of its own
    assert summarize(tmp_path, runs, VAL_LOSS)["winner"] == 7


def test_without_the_default_one_nothing_is_compared(tmp_path: Path) -> None:
    summary = summarize(tmp_path, [*losses(7, 0.1, 0.2), failed(0, 10)], VAL_LOSS)
    assert summary["winner"] == 7
    assert "the default configuration has no finished run to compare it with" in summary["verdict"]
    nobody = summarize(tmp_path, [failed(7, 10), failed(0, 10)], VAL_LOSS)
    assert nobody["winner"] is None
    assert nobody["verdict"] == (
        "no configuration has a finished run on a fresh seed; 2 of 2 runs failed"
    )


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    runs = [answered(tmp_path, n, 10, range(200 + n)) for n in (7, 0)]
    write_answers(tmp_path / "confirm-0-seed-10.jsonl", {1: True})
    with pytest.raises(UserError, match=r"confirm-7-seed-10\.jsonl, confirm-0-seed-10\.jsonl: not"):
        summarize(tmp_path, runs)


def test_equal_configurations_rarely_beat_each_other(tmp_path: Path) -> None:
    """Runs lie further apart than the questions explain, as trainings do: the questions alone would
    call a third of these gains real."""
    by_questions = by_both = 0
    for search in range(24):
        rng = random.Random(search)

        def trained(number: int, seed: int, rng: random.Random = rng) -> TrialRecord:
            skill = rng.gauss(0.5, 0.04)
            return answered(
                tmp_path, number, seed, [i for i in range(NUM_ITEMS) if rng.random() < skill]
            )

        summary = summarize(tmp_path, [trained(n, s) for n in (0, 7, 9) for s in (10, 11)])
        difference = summary["configurations"][0]["difference_to_default"]
        by_questions += bool(difference and difference["p_value"] < 0.05)
        by_both += " beats " in summary["verdict"]
    assert by_questions >= 6
    assert by_both <= 2


def raced(
    tmp_path: Path, *seconds: Sequence[int], default: Sequence[int] = (200, 190, 210)
) -> dict[str, Any]:
    """Return what a race comes to; of each candidate, from 7 on, how many it answered by seed."""
    rights = {0: default, **dict(enumerate(seconds, 7))}
    return summarize(
        tmp_path,
        [
            answered(tmp_path, number, seed, range(right))
            for number, values in rights.items()
            for seed, right in enumerate(values, 10)
        ],
    )


def test_who_came_further_in_the_race_is_better_whatever_luck_the_others_had(
    tmp_path: Path,
) -> None:
    summary = raced(tmp_path, (330,), (340, 300, 310), (331,))
    assert [c["number"] for c in summary["configurations"]] == [8, 9, 7, 0]
    assert summary["winner"] == 8
    out = {c["number"]: c["race"] and c["race"]["is_out"] for c in summary["configurations"]}
    assert out == {8: False, 9: True, 7: True, 0: None}
    assert summary["configurations"][1]["race"]["behind_best"] == pytest.approx(9 / 612)


def test_what_the_race_could_not_tell_is_said(tmp_path: Path) -> None:
    verdict = raced(tmp_path, (330,), (340, 330, 335), (60,))["verdict"]
    assert verdict.startswith("trial 8 beats the default configuration by 22.1 points")
    assert verdict.endswith("; 8 runs could not tell trial 8 from trial 7")
    verdict = raced(tmp_path, (330,), (340, 330, 335), (338,))["verdict"]
    assert verdict.endswith("; 8 runs could not tell trial 8 from trials 7 and 9")
    assert "could not tell" not in raced(tmp_path, (340, 330, 335), (60,))["verdict"]


def test_a_candidate_is_not_clearly_behind_by_other_seeds_alone(tmp_path: Path) -> None:
    """On these questions its lag is clear, on others it would not be."""
    summary = raced(tmp_path, (300, 300, 301), (297,), default=(299, 300, 299))
    second = summary["configurations"][-1]
    assert second["number"] == 8
    assert second["race"]["behind_best"] == pytest.approx(3 / 612)
    assert not second["race"]["is_clearly_behind"]


def test_the_default_one_wins_the_race_it_leads_on_the_seeds_that_both_have(
    tmp_path: Path,
) -> None:
    summary = raced(tmp_path, (230,), (340, 300, 310), default=(339, 320, 315))
    assert [c["number"] for c in summary["configurations"]] == [0, 8, 7]
    # All of its runs are worse on average than the candidate's single one.
    summary = raced(tmp_path, (340,), default=(341, 250, 250))
    assert summary["winner"] == 0


def test_the_table_of_a_race_says_who_left_when_and_why(tmp_path: Path) -> None:
    summary = raced(tmp_path, (330,), (340, 330, 335), (60,))
    left = [left_the_race(c, ACCURACY) for c in summary["configurations"]]
    assert left == [
        None,
        "after seed 10: 1.6 points behind, or by chance",
        None,
        "after seed 10: 45.8 points behind, clearly",
    ]
    file = io.StringIO()
    Console(file=file, width=200).print(confirmation_table(summary, ACCURACY))
    assert "after seed 10: 45.8 points behind, clearly" in file.getvalue()
    for c in summary["configurations"]:
        del c["race"]  # as earlier versions wrote it
        assert left_the_race(c, ACCURACY) is None


def test_the_table(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, 7, 10, range(300)),
        answered(tmp_path, 0, 10, range(280)),
        answered(tmp_path, 7, 11, range(302)),
        answered(tmp_path, 0, 11, range(281)),
        failed(9, 10),
    ]
    file = io.StringIO()
    Console(file=file, width=200).print(confirmation_table(summarize(tmp_path, runs), ACCURACY))
    rows = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert rows == [
        "trial runs mean mmstar_accuracy in the search to the default p left the race lr_mp",
        "7 2 0.4918 ± 0.0016 0.9 +0.0335 [+0.0195, +0.0475] 4.8e-07 - 0.08",
        "default 2 0.4583 ± 0.00082 - - - - 0.01",
        "9 0, 1 failed - 0.8 - - failed on seed 10 0.1",
    ]
