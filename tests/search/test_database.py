"""A study in a real PostgreSQL; skipped where there is none, or no driver for it."""

import shutil
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from nanovlm.cluster.relay import IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.cluster.worker_pool import INTERRUPTED, StopSwitch
from nanovlm.commands.dashboard import read_space
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.search.searcher import StudySearch
from nanovlm.search.study import show_study
from tests.postgres import Database, started_database
from tests.search.test_stages import Run

pytest.importorskip("psycopg")


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    if shutil.which("initdb") is None:
        pytest.skip("needs PostgreSQL")
    with started_database() as server:
        yield server


def space(folder: Path, database: Database, **overrides: Any) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text("search: {lr_mp: {log_uniform: [1e-4, 1e-1]}}")
    study = {"study.storage": database.url, "study.name": folder.name}
    return load_space(path, {**study, **overrides})


def ask(searcher: StudySearch, trial_id: str) -> dict[str, Any]:
    suggestion = searcher.suggest(trial_id)
    assert suggestion is not None, "the database answers"
    return suggestion


def finish(searcher: StudySearch, trial_id: str, value: float) -> None:
    result = {"mmstar_accuracy": value, SAMPLES_SEEN: 100, IS_FINAL: True}
    searcher.on_trial_complete(trial_id, result)


def test_a_search_goes_on_in_the_database(tmp_path: Path, database: Database) -> None:
    searched = space(tmp_path, database)
    first = StudySearch(searched, tmp_path, 1, StopSwitch())
    ask(first, "a")
    finish(first, "a", 0.5)
    under_way = ask(first, "b")
    again = StudySearch(searched, tmp_path, 1, StopSwitch())
    # There is no line for 0 in trials.jsonl yet, so that it runs again; it is told once.
    assert ask(again, "c")[NUMBER] == 0
    finish(again, "c", 0.1)
    assert ask(again, "d") == under_way
    finish(again, "d", 0.6)
    assert [trial.value for trial in again.study.trials] == [0.5, 0.6]


def test_two_searches_share_a_study(tmp_path: Path, database: Database) -> None:
    searched = space(tmp_path, database)
    searchers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        searchers.append(StudySearch(searched, tmp_path / name, 1, StopSwitch()))
    for number in range(3):
        for searcher in searchers:
            assert ask(searcher, str(number))[NUMBER] == number
            finish(searcher, str(number), 0.1 * number)
    trials = searchers[0].study.trials
    assert [trial.user_attrs[NUMBER] for trial in trials] == [0, 0, 1, 1, 2, 2]
    assert len({trial.user_attrs[VALUES]["lr_mp"] for trial in trials[2:]}) >= 2
    with pytest.raises(UserError, match="is the study of another space") as refused:
        StudySearch(space(tmp_path, database, epochs=2), tmp_path / "one", 1, StopSwitch())
    assert "***@127.0.0.1" in str(refused.value) and "hush" not in str(refused.value)


def test_a_database_that_comes_back_is_waited_for(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = StudySearch(space(tmp_path, database), tmp_path, 1, StopSwitch())
    ask(searcher, "a")
    database.stop()
    pauses: list[float] = []

    def come_back(switch: StopSwitch, seconds: float) -> None:
        pauses.append(seconds)
        database.start()

    monkeypatch.setattr(StopSwitch, "pause", come_back)
    finish(searcher, "a", 0.5)
    assert pauses == [1.0]
    assert [trial.value for trial in searcher.study.trials] == [0.5]


@pytest.mark.parametrize("lost", range(6))
def test_a_trial_whose_answer_is_lost_is_not_created_again(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The database stops after a commit and before it answers: here at each of a new trial's."""
    searched = space(tmp_path, database, **{"search.weight_decay": {"uniform": [0, 1]}})
    searcher = StudySearch(searched, tmp_path, 1, StopSwitch())
    ask(searcher, "a")
    commit, commits = Session.commit, count()

    def commit_and_stop(session: Session) -> None:
        commit(session)
        if next(commits) == lost:
            raise OperationalError("COMMIT", None, ConnectionError("lost the database"))

    monkeypatch.setattr(Session, "commit", commit_and_stop)
    monkeypatch.setattr(StopSwitch, "pause", lambda switch, seconds: None)
    asked = ask(searcher, "b")
    assert next(commits) > lost, "it stopped"
    whole = [t for t in searcher.study.trials if VALUES in t.user_attrs]
    assert [trial.user_attrs[NUMBER] for trial in whole] == [0, 1]
    assert whole[1].user_attrs[VALUES] == asked[VALUES]
    searcher.end_recorded([])
    assert ["FAIL"] * (len(searcher.study.trials) - 2) == [
        trial.state.name for trial in searcher.study.trials if trial not in whole
    ]


def test_a_search_that_is_interrupted_while_its_database_is_away_ends_and_goes_on(
    tmp_path: Path, database: Database
) -> None:
    searched, switch = space(tmp_path, database), StopSwitch()
    searcher = StudySearch(searched, tmp_path, 1, switch)
    under_way = ask(searcher, "a")
    database.stop()
    try:
        threading.Timer(0.2, switch.stop, [INTERRUPTED]).start()
        assert searcher.suggest("b") is None
        searcher.on_trial_complete("a", None)
        searcher.end_recorded([])
    finally:
        database.start()
    assert switch.reason == INTERRUPTED
    assert ask(StudySearch(searched, tmp_path, 1, StopSwitch()), "c") == under_way


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_file_of_a_search_has_the_password(tmp_path: Path, database: Database) -> None:
    study = {"study.storage": database.url, "study.name": tmp_path.name}
    run = Run(tmp_path, **{**study, "budget.trials": 2, "confirm.top": 0})
    assert run() == "budget.trials: 2 trials are done"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "tuner.pkl" in {path.name for path in files}
    secrets = (b"hush", b"hush".hex().encode())
    assert [p for p in files if any(secret in p.read_bytes() for secret in secrets)] == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_database_that_is_away_once_the_workers_are_there_is_waited_for(
    tmp_path: Path, database: Database
) -> None:
    """What has been checked before Ray started is no mistake of the user's."""

    def go_away(*_: object) -> None:
        database.stop()
        threading.Timer(0.5, database.start).start()

    study = {"study.storage": database.url, "study.name": tmp_path.name}
    run = Run(tmp_path, **{**study, "budget.trials": 2, "confirm.top": 0})
    assert run(on_start=go_away) == "budget.trials: 2 trials are done"
    (notice,) = run.notices
    assert notice.startswith("the study's storage fails, trying again: ")
    assert "hush" not in notice


def test_a_study_in_the_database_is_shown(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = space(tmp_path, database, **{"search.batch_size": {"choice": [64, 256]}})
    StudySearch(space(tmp_path, database, **{"study.name": "another"}), tmp_path, 1, StopSwitch())
    searcher = StudySearch(searched, tmp_path, 1, StopSwitch())
    suggested = [ask(searcher, "a")[VALUES]]
    finish(searcher, "a", 0.5)
    (tmp_path / "space.yaml").write_text(searched.to_yaml())
    monkeypatch.delenv("NANOVLM_DB_PASSWORD", raising=False)
    with pytest.raises(UserError, match="NANOVLM_DB_PASSWORD, which is not set; or give the URL"):
        read_space(tmp_path, None)
    assert read_space(tmp_path, database.url).study.storage == database.url
    monkeypatch.setenv("NANOVLM_DB_PASSWORD", "hush")
    shown = show_study(read_space(tmp_path, None), tmp_path)
    (study,) = shown.get_all_studies()
    suggested.append(ask(searcher, "b")[VALUES])
    trials = shown.get_all_trials(study._study_id)
    assert [trial.params for trial in trials] == suggested
    assert [trial.value for trial in trials] == [0.5, None]
