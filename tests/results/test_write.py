"""The results folder and the summary, from made-up records."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import Layer, build_config, config_values
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import UserError
from nanovlm.files import replace_text
from nanovlm.messages import Kind, Leg, TrialRecord, TrialState
from nanovlm.records import record_line
from nanovlm.results.folder import choose_folder
from nanovlm.results.read import FolderReader, answers_file, read_records
from nanovlm.results.statistics import interval_95, wilson_interval
from nanovlm.results.summary import best_record, summarize, turnarounds
from nanovlm.results.write import ResultsStore
from tests.records import make_record, make_report, make_speed

OBJECTIVE = Objective(metric="mmstar_accuracy", mode="max")


def test_programs_that_choose_the_same_default_name_get_folders_of_their_own(
    tmp_path: Path,
) -> None:
    results, num_programs = tmp_path / "results", 8
    all_have_chosen, all_are_made = (threading.Barrier(num_programs) for _ in range(2))

    def run(_: int) -> str:
        folder = choose_folder(results, None, "digits")
        all_have_chosen.wait(10)
        store = ResultsStore(folder, OBJECTIVE, 0, default_name="digits")
        with store.opened(resume=False):
            all_are_made.wait(10)
            assert (store.folder / "logs").is_dir()
        return store.folder.name

    with ThreadPoolExecutor(num_programs) as programs:
        names = set(programs.map(run, range(num_programs)))
    assert names == {"digits", *(f"digits-{number}" for number in range(2, num_programs + 1))}


def test_a_name_that_was_asked_for_is_not_changed(tmp_path: Path) -> None:
    folder = choose_folder(tmp_path, "mine", "digits")
    folder.mkdir()
    with (
        pytest.raises(UserError, match=r"--name: .*/mine exists already"),
        ResultsStore(folder, OBJECTIVE, 0).opened(resume=False),
    ):
        pass
    assert list(folder.iterdir()) == []


def record(
    number: int, accuracy: float, state: TrialState = "completed", **more: Any
) -> TrialRecord:
    metrics = {"mmstar_accuracy": accuracy, "mmstar_num_items": 400.0}
    config = TrainConfig(lr_mp=0.01 * (number + 1))
    report = make_report(
        100, metrics, seconds=2.0, evaluation_seconds=0.5, speed=make_speed(), is_final=True
    )
    values: dict[str, Any] = {
        "parameters": {"lr_mp": config.lr_mp},
        "config": config_values(config),
        "reports": [report],
        "submitted_at": 10.0 * number,
        "first_step_at": 10.0 * number + 1,
        "ended_at": 10.0 * number + 9,
        "worker_group": "group-0",
    }
    return make_record(number, state, **(values | more))


def with_model(folder: Path, trial: TrialRecord) -> None:
    model = folder / "checkpoints" / trial.trial_id
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text(trial.trial_id)


def fill(store: ResultsStore) -> None:
    """Let four trials end as in a search."""
    store.begin()
    for number, accuracy in enumerate([0.5, 0.8, 0.7]):
        trial = record(number, accuracy)
        with_model(store.folder, trial)
        store.take(trial)
    store.take(record(3, 0.9, "stopped", reason="below the cutoff"))
    store.write_summary(wall_seconds=50.0)


def test_answers_are_kept_of_trials_that_ended(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
        for number in range(5):  # the last one was under way when the search was interrupted
            replace_text(answers_file(store.folder, f"trial-{number:04d}"), "{}\n")
        (store.folder / "answers" / ".trial-0005.jsonl.part").write_text("{")
        store.close(1.0, "budget.trials")
    kept = {path.name for path in (store.folder / "answers").iterdir()}
    assert kept == {f"trial-000{number}.jsonl" for number in range(4)}


def test_a_search_in_the_folder(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=2)
    with store.opened(resume=False):
        fill(store)

    lines = (store.folder / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3]
    assert read_records(store.folder) == store.records
    assert (store.folder / "best" / "model.safetensors").read_text() == "trial-0001"
    assert [path.name for path in (store.folder / "checkpoints").iterdir()] == ["trial-0001"]
    best = read_mapping(store.folder / "best.yaml")
    assert build_config(Layer("best.yaml", best)) == TrainConfig(lr_mp=0.02)
    summary = json.loads((store.folder / "summary.json").read_text())
    assert summary["best"]["number"] == 1
    assert summary["trials"] == {
        "total": 4, "completed": 3, "stopped": 1, "failed": 0, "paused": 0,
    }  # fmt: skip
    assert summary["turnaround_seconds"] == {"median": 2.0, "p95": 2.0, "max": 2.0}
    assert summary["training_seconds"] == 8.0
    assert summary["gpu_hours"] == pytest.approx(16 / 3600)
    assert {path.name for path in store.folder.iterdir()} == {
        "best", "best.yaml", "checkpoints", "logs", "summary.json", "trials.jsonl",
    }  # fmt: skip


def test_paused_trials_are_kept_until_they_go_on_or_end(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=1)
    with store.opened(resume=False):
        store.begin()
        for number in range(5):
            store.take(record(number, 0.5, "running"))  # the first time: nothing to say
            store.take(record(number, 0.5, "paused"))
            replace_text(answers_file(store.folder, f"trial-{number:04d}"), "{}\n")
        store.take(record(1, 0.5, "running", worker_group=None))
        store.take(record(1, 0.5, "running"))
        store.take(record(2, 0.5, "running"))
        store.take(record(2, 0.6, "paused"))
        store.take(record(3, 0.5, "stopped"))
        again = record(4, 0.5, "paused")
        store.take(again)  # taken up, in a later run of the program
        summary = store.close(9.0, "interrupted")
    assert summary["trials"]["total"] == 1 and summary["trials"]["paused"] == 3
    assert summary["training_seconds"] == 8.0
    expected = {number: record(number, value, "paused") for number, value in WAITING}
    reader = FolderReader(store.folder)
    assert store.paused == reader.paused(store.records) == expected and not reader.notes
    num_lines = len((store.folder / "paused.jsonl").read_text().splitlines())
    assert num_lines == 5 + 3  # two that went on, and one that paused again
    kept = {path.stem for path in (store.folder / "answers").iterdir()}
    assert kept == {f"trial-000{number}" for number in (0, 2, 3, 4)}

    resumed = ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=1)
    with resumed.opened(resume=True):
        assert resumed.paused == expected and not resumed.notes
        assert len((store.folder / "paused.jsonl").read_text().splitlines()) == 3
        resumed.take(record(2, 0.7))
        assert [*resumed.paused] == [0, 4]


WAITING = ((0, 0.5), (2, 0.6), (4, 0.5))


def test_records_that_come_together_share_their_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave the folder as if they had come one by one."""
    records = [record(0, 0.5, "running"), record(0, 0.5, "paused"), record(1, 0.7)]
    records += [record(2, 0.6, "paused"), record(0, 0.5, "running"), record(2, 0.6, "stopped")]
    records += [record(3, 0.8), record(4, 0.1, "paused"), record(5, 0.75)]
    files, num_syncs = {}, []
    fsync = os.fsync
    for name, batches in (("one by one", [[r] for r in records]), ("together", [records])):
        num_syncs.append(0)

        def count(file: int) -> None:
            num_syncs[-1] += 1
            fsync(file)

        monkeypatch.setattr(os, "fsync", count)
        store = ResultsStore(tmp_path / name, OBJECTIVE, gpus_per_trial=0)
        with store.opened(resume=False):
            store.begin()
            for batch in batches:
                store.take(*batch)
        head, *lines = (store.folder / "best.yaml").read_text().splitlines()
        assert name in head
        files[name] = (
            lines,
            *((store.folder / n).read_bytes() for n in ("paused.jsonl", "trials.jsonl")),
        )
        assert [r.number for r in store.records] == [1, 2, 3, 5] and [*store.paused] == [4]
        assert store.best is not None and store.best.number == 3
    assert files["one by one"] == files["together"]
    assert num_syncs == [3 + 4 + 2 * 2, 1 + 1 + 2]  # of pauses, ends, and the two of each best.yaml


def test_a_line_of_a_paused_trial_that_is_lost_is_told_and_no_more(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        store.begin()
        for number in range(3):
            store.take(record(number, 0.5, "paused"))
        store.close(9.0, "interrupted")
    path = store.folder / "paused.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{}\n" + lines[2][:-9])
    with (resumed := ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=0)).opened(resume=True):
        assert [*resumed.paused] == [0]
        resumed.take(record(1, 0.5, "paused"))
    cut, damaged, lost = resumed.notes
    assert cut.endswith("paused.jsonl: the last line was cut, and is left out")
    assert "paused.jsonl: line 2: is not a trial that pauses: " in damaged
    assert "paused.jsonl: has 1 trials, but 3 are paused; a trial that is lost here" in lost
    with (again := ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=0)).opened(resume=True):
        assert [*again.paused] == [0, 1] and len(again.notes) == 1  # of the number
        again.close(10.0, "interrupted")
    with (last := ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=0)).opened(resume=True):
        assert [*last.paused] == [0, 1] and not last.notes


def test_the_summary_is_not_written_for_every_trial(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    path = store.folder / "summary.json"
    with store.opened(resume=False):
        fill(store)
        store.take(record(4, 0.6))
        store.write_summary(wall_seconds=51.0)
        assert json.loads(path.read_text())["trials"]["total"] == 4
        store.close(52.0, "budget.trials")
    assert json.loads(path.read_text())["trials"]["total"] == 5


def test_a_search_that_goes_on_knows_its_best(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
    again = ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=0)
    with again.opened(resume=True):
        again.take(record(4, 0.79))
        assert "trial 1:" in (store.folder / "best.yaml").read_text()
        again.take(record(5, 0.81))
    assert "trial 5:" in (store.folder / "best.yaml").read_text()


def test_only_trials_of_full_length_can_be_best() -> None:
    records = [record(0, 0.5), record(1, 0.9, "stopped"), record(2, 0.5)]
    best = best_record(records, OBJECTIVE)
    assert best is records[0]
    worst = best_record(
        [record(0, 0.5), record(1, 0.2)], Objective(metric="mmstar_accuracy", mode="min")
    )
    assert worst is not None and worst.number == 1
    assert best_record([record(1, 0.9, "failed")], OBJECTIVE) is None


def test_the_summary_of_nothing() -> None:
    summary = summarize("empty", [], OBJECTIVE, wall_seconds=1.0, gpus_per_trial=1.0)
    assert summary["best"] is None
    assert summary["turnaround_seconds"] == {"median": None, "p95": None, "max": None}


def test_turnaround_is_counted_within_a_group() -> None:
    records = [
        record(0, 0.5, worker_group="a", first_step_at=1.0, ended_at=5.0),
        record(1, 0.5, worker_group="b", first_step_at=2.0, ended_at=4.0),
        record(2, 0.5, worker_group="a", first_step_at=5.5, ended_at=9.0),
        record(3, 0.5, worker_group="b", first_step_at=4.25, ended_at=9.0),
        record(4, 0.5, "failed", worker_group="a", first_step_at=None, ended_at=9.5),
    ]
    assert turnarounds(records) == [0.25, 0.5]


def test_turnaround_is_counted_for_each_leg_of_a_trial() -> None:
    def leg(group: str, first_step_at: float | None, ended_at: float) -> Leg:
        return Leg(worker_group=group, first_step_at=first_step_at, ended_at=ended_at)

    records = [
        record(0, 0.5, legs=(leg("a", 1.0, 2.0), leg("a", 5.25, 6.0), leg("b", 8.0, 9.0))),
        record(1, 0.5, legs=(leg("a", 2.5, 5.0),)),
        record(2, 0.5, "failed", legs=(leg("a", None, 7.0),)),
        record(3, 0.5, legs=(leg("a", 7.125, 8.0),)),
    ]
    assert turnarounds(records) == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    # Table I of Newcombe (1998), Statistics in Medicine 17:857, method 3 (Wilson).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(right: int, items: int, low: float, high: float) -> None:
    assert wilson_interval(right / items, items) == pytest.approx((low, high), abs=5e-5)


def test_only_a_proportion_has_an_interval() -> None:
    assert interval_95({"val_loss": 1.0, "mmstar_num_items": 100}, "val_loss") is None
    assert interval_95({"mmstar_accuracy": 0.5}, "mmstar_accuracy") is None


def test_both_accuracies_have_an_interval() -> None:
    metrics = {"mmstar_accuracy": 0.5, "mmstar_letter_accuracy": 0.25, "mmstar_letter_nll": 1.3}
    metrics["mmstar_num_items"] = 100
    assert interval_95(metrics, "mmstar_accuracy") == wilson_interval(0.5, 100)
    assert interval_95(metrics, "mmstar_letter_accuracy") == wilson_interval(0.25, 100)
    assert interval_95(metrics, "mmstar_letter_nll") is None


def test_the_folder_of_a_search(tmp_path: Path) -> None:
    assert choose_folder(tmp_path, None, "digits") == tmp_path / "digits"
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits-2").mkdir()
    assert choose_folder(tmp_path, None, "digits") == tmp_path / "digits-3"
    assert choose_folder(tmp_path, "mine", "digits") == tmp_path / "mine"
    with pytest.raises(UserError, match="holds results already"):
        choose_folder(tmp_path, "digits", "digits")
    for name in ("..", "a/b", ""):
        with pytest.raises(UserError, match="plain name"):
            choose_folder(tmp_path, name, "digits")


def test_what_others_have_put_there_stays(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    answers = store.folder / "answers"
    with store.opened(resume=False):
        fill(store)
        (answers / "mine").mkdir(parents=True)
        for name in ("notes.txt", "trial-0000.jsonl.bak", "trial-0000-mine.jsonl"):
            (answers / name).write_text("mine")
        (answers / "trial-0009.jsonl").write_text("of a trial that did not end")
        (answers / ".trial-0009.jsonl.17.part").write_text("and half a file of it")
        store.close(1.0, "budget.trials")
    assert {path.name for path in answers.iterdir()} == {
        "mine", "notes.txt", "trial-0000.jsonl.bak", "trial-0000-mine.jsonl",
    }  # fmt: skip


def test_a_folder_for_nothing_keeps_what_is_not_the_programs(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results" / "demo", OBJECTIVE, gpus_per_trial=0)
    with pytest.raises(KeyboardInterrupt), store.opened(resume=False):
        store.write_text("study.id", "0")
        (store.folder / "notes.txt").write_text("mine")
        raise KeyboardInterrupt
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


def test_a_folder_for_nothing_is_removed(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results" / "demo", OBJECTIVE, gpus_per_trial=0)
    with pytest.raises(KeyboardInterrupt), store.opened(resume=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_used_by_one_program_at_a_time(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    other = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
        with pytest.raises(UserError, match="another program works in"), other.opened(resume=True):
            pass
    with other.opened(resume=True):
        assert len(other.records) == 4


def test_a_path_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ResultsStore(tmp_path / "file" / "demo", OBJECTIVE, gpus_per_trial=0)
    with pytest.raises(UserError, match="cannot be made: Not a directory"), store.opened(False):
        pass


def test_a_search_of_before_the_speed_was_measured_goes_on(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
    path = store.folder / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for report in line["reports"]:
            del report["speed"], report["evaluation_seconds"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with again.opened(resume=True):
        again.take(record(4, 0.9))
        again.close(wall_seconds=60.0, ended_by="budget.trials")
    read = read_records(store.folder)
    assert [trial.reports[-1].speed is not None for trial in read] == [False] * 4 + [True]
    summary = json.loads((store.folder / "summary.json").read_text())
    assert (summary["best"]["number"], summary["training_seconds"]) == (4, 10.0)


def test_a_line_that_was_cut_is_dropped_and_another_bad_line_is_told(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
    path = store.folder / "trials.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:100])
    assert len(read_records(store.folder)) == 4
    again = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with again.opened(resume=True):
        again.take(record(4, 0.6))
    assert [r.number for r in read_records(store.folder)] == [0, 1, 2, 3, 4]
    path.write_text("half a line\n" + whole)
    with pytest.raises(UserError, match=r"trials\.jsonl: line 1: is not a trial"):
        read_records(store.folder)


def test_a_trial_that_has_not_ended_or_is_there_twice_is_told(tmp_path: Path) -> None:
    lines = [record_line(record(number, 0.5)) for number in range(2)]
    path = tmp_path / "trials.jsonl"
    path.write_text("".join([*lines, record_line(record(2, 0.5, "paused"))]))
    with pytest.raises(UserError, match=r"line 3: is not a trial: trial-0002 has not ended; put"):
        read_records(tmp_path)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r"trials\.jsonl: a trial is there twice"):
        read_records(tmp_path)


@pytest.mark.parametrize("is_settled", [False, True])
def test_models_of_confirming_runs_stay_until_the_winner_is_known(
    tmp_path: Path, is_settled: bool
) -> None:
    store = ResultsStore(tmp_path / "demo", OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        fill(store)
        for seed, accuracy in ((1, 0.8), (2, 0.7)):
            more: dict[str, Any] = {"config": {"seed": seed}, "kind": Kind.CONFIRM}
            run = record(1, accuracy, trial_id=f"confirm-1-seed-{seed}", **more)
            with_model(store.folder, run)
            store.take(run)
        store.close(1.0, "budget.trials", is_settled)
    models = {path.name for path in (store.folder / "checkpoints").iterdir()}
    assert models == {"trial-0001", "confirm-1-seed-1", *["confirm-1-seed-2"][is_settled:]}
