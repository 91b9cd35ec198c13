"""A results folder as tables, from made-up records, and the examples of docs/python.md."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.parameter import TUNABLE
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values, load_config
from nanovlm.config.space import load_space
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import UserError
from nanovlm.messages import End, Kind, TrialRecord, TrialState
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.records import record_line
from nanovlm.results.load import _REPORT_COLUMNS, _RUN_COLUMNS, Results, load_results
from nanovlm.results.read import answers_file
from nanovlm.results.write import ResultsStore
from tests.records import make_record, make_report, make_speed
from tests.results.answers import write_answers

REPOSITORY = Path(__file__).parents[2]
SPACE = REPOSITORY / "search_spaces" / "digits.yaml"
BASE = load_space(SPACE).base


def record(
    number: int, accuracy: float, state: TrialState = "completed", **more: Any
) -> TrialRecord:
    config = dataclasses.replace(BASE, lr_mp=0.01 * (number + 1), batch_size=16)
    reports = [
        make_report(
            samples,
            {"mmstar_accuracy": value, "mmstar_num_items": 2.0},
            step=samples // 16,
            seconds=samples / 100,
            evaluation_seconds=0.5,
            speed=make_speed(),
        )
        for samples, value in ((160, accuracy / 2), (320, accuracy))
    ]
    values: dict[str, Any] = {
        "parameters": {"lr_mp": config.lr_mp, "lr_backbones": 1e-3, "batch_size": 16},
        "config": config_values(config),
        "reports": reports,
        "submitted_at": 1.7e9 + number,
        "first_step_at": 1.7e9 + number + 1,
        "ended_at": 1.7e9 + number + 9.5,
        "worker_group": "group-0",
    }
    return make_record(number, state, **(values | more))


def failed(number: int) -> TrialRecord:
    return record(
        number,
        0.0,
        reason="out of memory",
        end=End.OUT_OF_MEMORY,
        reports=(),
        first_step_at=None,
    )


def confirming(number: int, seed: int, accuracy: float) -> TrialRecord:
    config = config_values(dataclasses.replace(BASE, seed=seed))
    trial_id = f"confirm-{number}-seed-{seed}"
    return record(number, accuracy, trial_id=trial_id, kind=Kind.CONFIRM, config=config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a search that has ended."""
    store = ResultsStore(
        tmp_path / "results" / "digits",
        Objective(metric="mmstar_accuracy", mode="max"),
        gpus_per_trial=0,
    )
    with store.opened(resume=False):
        store.begin()
        store.write_text("space.yaml", load_space(SPACE).to_yaml())
        for trial in (record(2, 0.8), record(0, 0.5), failed(3), record(1, 0.6, "stopped")):
            store.take(trial)
        for number, accuracy in ((2, 0.7), (0, 0.5)):
            store.take(confirming(number, 1, accuracy))
        for number in range(2):
            answers = {7: True, 3: number == 0}
            write_answers(answers_file(store.folder, f"trial-{number:04d}"), answers)
        store.close(20.0, "budget.trials")
    return store.folder


@pytest.fixture
def results(folder: Path) -> Results:
    return load_results(str(folder))


def test_a_row_for_each_ended_trial(results: Results) -> None:
    trials = results.trials
    assert list(trials["number"]) == [0, 1, 2, 3]
    assert list(trials["state"]) == ["completed", "stopped", "completed", "failed"]
    assert list(trials["lr_mp"]) == [0.01, 0.02, 0.03, 0.04]
    assert list(trials["mmstar_accuracy"][:3]) == [0.5, 0.6, 0.8]
    assert list(trials["seconds"][:3]) == [3.2, 3.2, 3.2]
    last = trials.iloc[3]
    assert (last["reason"], last["is_infeasible"], last["samples_seen"]) == (
        "out of memory",
        True,
        0,
    )
    assert trials.isna().iloc[3][["mmstar_accuracy", "seconds", "first_step_at"]].all()
    assert trials["ended_at"][0].isoformat().startswith("2023-11-14T22:13:29.5")
    assert str(trials["ended_at"].dtype).endswith("UTC]")
    assert str(trials["number"].dtype) == str(trials["batch_size"].dtype) == "int64"


def test_a_row_for_each_report(results: Results) -> None:
    reports = results.reports
    assert list(reports["number"]) == [0, 0, 1, 1, 2, 2]
    assert list(reports["samples_seen"]) == [160, 320] * 3
    assert list(reports["mmstar_accuracy"]) == [0.25, 0.5, 0.3, 0.6, 0.4, 0.8]
    assert set(reports["samples_per_second"]) == {100.0}


def test_the_runs_that_confirm(results: Results) -> None:
    confirmed = results.confirmed
    assert list(confirmed["trial_id"]) == ["confirm-2-seed-1", "confirm-0-seed-1"]
    assert list(confirmed["seed"]) == [1, 1]
    assert list(confirmed["mmstar_accuracy"]) == [0.7, 0.5]


def test_what_is_not_a_table(results: Results, folder: Path) -> None:
    space = load_space(folder / "space.yaml")
    assert results.space == space
    assert results.config("trial-0002") == dataclasses.replace(BASE, lr_mp=0.03, batch_size=16)
    assert results.config("confirm-2-seed-1").seed == 1
    assert results.best_config == load_config(folder / "best.yaml", None, {})
    assert results.summary is not None and results.summary["trials"]["failed"] == 1
    assert dict(results.answers("trial-0001")["correct"]) == {7: True, 3: False}


def test_no_searched_key_has_the_name_of_another_column() -> None:
    assert TUNABLE.keys() & {*_RUN_COLUMNS, *_REPORT_COLUMNS} == set()


def test_a_search_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(load_space(SPACE).to_yaml())
    results = load_results(tmp_path)
    assert list(results.trials.columns) == [*_RUN_COLUMNS, "lr_mp", "lr_backbones", "batch_size"]
    assert len(results.trials) == len(results.reports) == len(results.confirmed) == 0
    assert len(results.trials[results.trials["state"] == "completed"]) == 0
    assert (results.summary, results.best_config) == (None, None)


def test_a_single_run(folder: Path) -> None:
    for name in ("space.yaml", "confirm.jsonl", "summary.json"):
        (folder / name).unlink()
    results = load_results(folder)
    assert results.space is None
    assert len(results.trials) == 4 and len(results.confirmed) == 0


def test_paused_trials_are_a_table_of_their_own(folder: Path, results: Results) -> None:
    assert len(results.paused) == 0
    waits, gone_on, ended = record(8, 0.4, "paused"), record(7, 0.4), record(0, 0.5, "paused")
    lines = [record(7, 0.4, "paused"), waits, ended, dataclasses.replace(gone_on, end=None)]
    (folder / "paused.jsonl").write_text("".join(map(record_line, lines)))
    again = load_results(folder)
    assert again.paused[["number", "state", "samples_seen"]].values.tolist() == [[8, "paused", 320]]
    assert list(again.paused.columns) == list(results.trials.columns)
    assert len(again.trials) == len(results.trials)
    assert len(again.reports) == len(results.reports) + 2
    assert again.config("trial-0008").lr_mp == 0.09


def test_a_last_line_that_is_cut_is_left_out(folder: Path) -> None:
    path = folder / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert list(load_results(folder).trials["number"]) == [0, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trials.jsonl", "{}\n", "trials.jsonl: line 1: is not a trial"),
        ("space.yaml", "search: {}", "space.yaml: search"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_results(folder)


@pytest.mark.parametrize("name", ["summary.json", "best.yaml"])
@pytest.mark.parametrize("content", [None, "", "lr_mp: quick"])
def test_what_follows_from_the_trials_need_not_be_read(
    folder: Path, results: Results, name: str, content: str | None
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    again = load_results(folder)
    assert again.best_config == results.best_config
    assert again.summary is not None and results.summary is not None
    same = ("trials", "best", "training_seconds", "confirmation")
    assert all(again.summary[key] == results.summary[key] for key in same)
    assert bool(again.notes) == (name == "summary.json")


def test_what_is_not_there_is_named(folder: Path, results: Results) -> None:
    with pytest.raises(UserError, match=r"is not a results folder, it has no space\.yaml"):
        load_results(folder.parent)
    with pytest.raises(
        UserError, match=r"no ended or paused trial is called 'trial-0009'\. Did you mean"
    ):
        results.config("trial-0009")
    with pytest.raises(UserError, match=r"trial-0002\.jsonl: there is no such file\. Did you mean"):
        results.answers("trial-0002")
    (folder / "answers" / "trial-0001.jsonl").write_text('{"index": 1, "ans')
    with pytest.raises(UserError, match=r"trial-0001\.jsonl: line 1: is not an answer"):
        results.answers("trial-0001")


def test_the_examples_of_the_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    VisionLanguageModel(BASE.vlm).save_pretrained(folder / "best")
    monkeypatch.chdir(folder.parents[1])
    document = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    text = document[document.index("## Reading results") :]  # search/test_runner.py has the others
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), scope)
    assert "builtin:digits" in capsys.readouterr().out
    assert list(scope["full"]["number"]) == [0, 2]
    assert list(scope["curves"].columns) == [0, 1, 2]
    assert list(scope["differ"].index) == [3]
    assert read_mapping(Path("longer.yaml"))["epochs"] == 6
