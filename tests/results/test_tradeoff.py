"""Which trial a search with several objectives takes, and what it says of the others."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nanovlm.config.search_settings import Objective, join
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import summarize_confirmation
from nanovlm.results.pareto import choose, hypervolumes
from nanovlm.results.read import FolderReader
from nanovlm.results.retention import CheckpointRetention, model_dir
from nanovlm.results.summary import best_record, final_best, summarize
from nanovlm.results.write import ResultsStore
from nanovlm.watch.report.folder import read_search
from nanovlm.watch.report.page import render
from nanovlm.watch.report.result_charts import front_chart, hypervolume_chart
from nanovlm.watch.terminal.search_display import SearchDisplay
from tests.records import make_record, make_report, make_speed
from tests.results.starts import search_start
from tests.watch.pages import table_rows


def objective_of(**bound: float) -> Objective:
    seconds = {"metric": "seconds_per_sample", **bound}
    return join([Objective(), Objective.model_validate(seconds)])


def trial(
    number: int, accuracy: float, seconds: float, state: Any = "completed", **more: Any
) -> TrialRecord:
    speed = make_speed(samples_per_second=1 / seconds)
    report = make_report(900, {"mmstar_accuracy": accuracy}, speed=speed, is_final=True)
    return make_record(number, state, reports=[report], config={"seed": 0}, **more)


TRIALS = [
    trial(0, 0.80, 0.010),
    trial(1, 0.90, 0.040),  # the best, and dear
    trial(2, 0.88, 0.012),  # nearly as good, at a third of it: the knee
    trial(3, 0.50, 0.005),
    trial(4, 0.86, 0.012),
    trial(5, 0.89, 0.0405),
    trial(6, 0.99, 0.001, "stopped"),  # on the way it was better than all, but it is no full one
]


def test_the_knee_is_chosen() -> None:
    choice = choose(TRIALS, objective_of())
    assert choice is not None
    assert (choice.record.number, choice.how) == (2, "knee")
    assert [record.number for record in choice.front] == [1, 2, 0, 3]
    assert best_record(TRIALS, objective_of()) is TRIALS[2]
    assert best_record(TRIALS, Objective()) is TRIALS[1], "of one objective it is the best"


@pytest.mark.parametrize(("at_most", "number"), [(0.011, 0), (0.03, 2), (1.0, 1), (0.005, 3)])
def test_a_bound_leaves_the_best_by_the_first_objective(at_most: float, number: int) -> None:
    choice = choose(TRIALS, objective_of(at_most=at_most))
    assert choice is not None and (choice.record.number, choice.how) == (number, "bounds")


def test_a_bound_that_nobody_keeps_is_said() -> None:
    objective = objective_of(at_most=0.0002)
    summary = summarize("x", TRIALS, objective, wall_seconds=1, gpus_per_trial=0)
    assert summary["pareto"]["chosen"] == 3 == summary["best"]["number"]
    assert summary["pareto"]["chosen_by"] == "nearest to the bounds"
    assert summary["pareto"]["reason"].startswith(
        "no trial of full length keeps seconds_per_sample at most 0.0002; trial 3 is the nearest "
        "to it (mmstar_accuracy 0.5, seconds_per_sample 0.005); also on the front: trial 1: "
    )


def test_the_summary_tells_of_the_front_and_of_one_objective_nothing() -> None:
    pareto = summarize("x", TRIALS, objective_of(), wall_seconds=1, gpus_per_trial=0)["pareto"]
    assert [entry["number"] for entry in pareto["front"]] == [1, 2, 0, 3]
    assert pareto["front"][1]["values"] == pytest.approx(
        {"mmstar_accuracy": 0.88, "seconds_per_sample": 0.012}
    )
    assert pareto["reference"]["mmstar_accuracy"] == pytest.approx(0.5 - 0.04)
    assert pareto["reference"]["seconds_per_sample"] == pytest.approx(0.049, rel=0.05)
    assert 0.4 < pareto["hypervolume"] < 0.95
    assert "pareto" not in summarize("x", TRIALS, Objective(), wall_seconds=1, gpus_per_trial=0)
    none = summarize("x", TRIALS[6:], objective_of(), wall_seconds=1, gpus_per_trial=0)
    assert (none["best"], none["pareto"]["chosen"], none["pareto"]["front"]) == (None, None, [])


def test_the_hypervolume_never_falls() -> None:
    shares = hypervolumes(TRIALS, objective_of())
    assert shares == sorted(shares) and len(shares) == len(TRIALS)
    assert shares[0] > 0 and shares[2] > shares[1] and shares[5] == shares[3]
    choice = choose(TRIALS, objective_of())
    assert choice is not None and shares[-1] == pytest.approx(choice.hypervolume)


def test_models_of_the_front_are_kept(tmp_path: Path) -> None:
    """Any of them may come to be the one that is chosen, so no number limits them."""
    models = CheckpointRetention(tmp_path, objective_of(), num_best=1)
    for record in TRIALS:
        model_dir(tmp_path, record.trial_id).mkdir(parents=True)
        models.settle(record)
    kept = sorted(int(path.name[-4:]) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [0, 1, 2, 3]


def test_a_trial_may_make_another_one_the_best(tmp_path: Path) -> None:
    """The knee is that of all: a new end of the front moves it to a trial that was there before."""
    store = ResultsStore(tmp_path / "x", objective_of(), 0.0)
    with store.opened(resume=False):
        store.begin()
        records = [trial(0, 0.9, 0.010), trial(1, 0.8, 0.0072), trial(2, 0.3, 0.004)]
        chosen = []
        for record in records:
            store.take(record)
            assert store.best is not None
            chosen.append(store.best.number)
    assert chosen == [0, 0, 1]
    text = (tmp_path / "x" / "best.yaml").read_text()
    assert "trial 1: mmstar_accuracy 0.8 (mmstar_accuracy 0.8, seconds_per_sample 0.0072)" in text


def run(number: int, seed: int, accuracy: float) -> TrialRecord:
    report = make_report(900, {"mmstar_accuracy": accuracy}, is_final=True)
    name = f"confirm-{number}-seed-{seed}"
    return make_record(number, reports=[report], trial_id=name, config={"seed": seed})


def test_the_chosen_one_wins_whatever_the_first_objective_says(tmp_path: Path) -> None:
    """It was not chosen by that alone; but the verdict says what it costs."""
    runs = [run(n, seed, value + seed / 1000) for n, value in ((0, 0.85), (2, 0.82))
            for seed in (1, 2, 3)]  # fmt: skip
    found = summarize_confirmation(runs, TRIALS, objective_of(), tmp_path)
    assert found is not None and (found["winner"], found["gain_counts"]) == (2, False)
    assert found["verdict"].startswith(
        "trial 2 is behind the default configuration: its gain of -3.0 points [-3.0, -3.0]"
    )
    assert found["verdict"].endswith("that is of mmstar_accuracy alone, not of the trade-off")
    best = final_best(TRIALS, objective_of(), runs, found)
    assert best is not None and best.trial_id == "confirm-2-seed-1"
    later = [*TRIALS, trial(7, 0.89, 0.011)]  # is the knee now, and has not run again
    found = summarize_confirmation(runs, later, objective_of(), tmp_path)
    assert final_best(later, objective_of(), runs, found) is later[-1]
    alone = summarize_confirmation(runs, TRIALS, Objective(), tmp_path)
    assert alone is not None and alone["winner"] == 0


def test_without_the_space_file_the_objectives_are_known(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "x", objective_of(at_most=0.011), 0.0)
    with store.opened(resume=False):
        store.begin()
        store.take(TRIALS[0])
        store.close(1.0, "over")
    assert FolderReader(tmp_path / "x").objective() == objective_of(at_most=0.011)


def test_the_report_draws_the_front(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "x", objective_of(), 0.0)
    with store.opened(resume=False):
        store.begin()
        for record in TRIALS:
            store.take(record)
        store.close(1.0, "over")
    search = read_search(tmp_path / "x")
    text = render(search)
    assert "Trial 2 is the knee of the front of mmstar_accuracy, seconds_per_sample" in text
    assert "Chosen, mmstar_accuracy" in text
    (variant,) = front_chart(search).variants
    marks = {trace["name"]: trace.get("customdata") for trace in variant["traces"]}
    assert marks["chosen"] == ["trial-0002"] and marks["stopped"] == ["trial-0006"]
    assert marks["on the front"] == ["trial-0001", "trial-0000", "trial-0003"]
    (line,) = [trace for trace in variant["traces"] if trace["name"] == "front"]
    assert line["y"] == [0.5, 0.8, 0.88, 0.9]
    assert line["x"] == pytest.approx([0.005, 0.01, 0.012, 0.04])
    rows = table_rows(text, "front-table")
    assert [row[0] for row in rows] == ["1", "2", "0", "3"]
    assert [row[1] for row in rows].index("chosen") == 1
    (grown,) = hypervolume_chart(search).variants
    assert grown["traces"][0]["y"] == pytest.approx(hypervolumes(TRIALS, objective_of()), rel=1e-5)


def test_a_report_on_one_objective_has_no_front(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "x", Objective(), 0.0)
    with store.opened(resume=False):
        store.begin()
        store.take(TRIALS[0])
        store.close(1.0, "over")
    text = render(read_search(tmp_path / "x"))
    assert 'id="tradeoff"' not in text and "front-table" not in text


def test_the_terminal_says_what_was_chosen_and_why(tmp_path: Path) -> None:
    summary = summarize("x", TRIALS, objective_of(), wall_seconds=1, gpus_per_trial=0)
    console = Console(width=200, record=True, file=io.StringIO())
    start = dataclasses.replace(search_start(tmp_path), objective=objective_of(), records=TRIALS)
    with SearchDisplay(console) as display:
        display.begin(start)
        display.end(summary)
    text = console.export_text()
    assert "chosen: trial 2 is the knee of the front of mmstar_accuracy, seconds_per_" in text
    assert re.search(r"trial +state +samples +mmstar_accuracy.* +seconds_per_sample", text)
