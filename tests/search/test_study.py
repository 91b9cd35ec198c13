"""Where a search is kept: files that were cut, databases that do not answer, other spaces."""

from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.results.read import STUDY_FILE
from nanovlm.samplers.optuna_compat import create_trial
from nanovlm.search.study import SPACE as SPACE_OF
from nanovlm.search.study import open_study

SPACE = "search: {lr_mp: {log_uniform: [1e-4, 1e-1]}, batch_size: {choice: [64, 256]}}\n"


def space(tmp_path: Path, text: str = SPACE, **overrides: Any) -> SearchSpace:
    (tmp_path / "space.yaml").write_text(text)
    return load_space(tmp_path / "space.yaml", overrides)


def ask(searched: SearchSpace, folder: Path) -> optuna.Study:
    place = open_study(searched, folder)
    study = optuna.load_study(study_name=place.name, storage=place.storage)
    study.tell(study.ask({"lr_mp": optuna.distributions.FloatDistribution(0, 1)}), 0.5)
    return study


def test_a_study_goes_on_after_its_last_line_was_cut(tmp_path: Path) -> None:
    ask(space(tmp_path), tmp_path)
    whole = (tmp_path / STUDY_FILE).read_bytes()
    with (tmp_path / STUDY_FILE).open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    assert len(ask(space(tmp_path), tmp_path).trials) == 2
    assert (tmp_path / STUDY_FILE).read_bytes().startswith(whole)


def test_a_lock_that_a_killed_program_left_stops_nobody(tmp_path: Path) -> None:
    ask(space(tmp_path), tmp_path)
    (tmp_path / f"{STUDY_FILE}.lock").symlink_to(tmp_path / STUDY_FILE)
    assert len(ask(space(tmp_path), tmp_path).trials) == 2


def test_a_new_trial_is_asked_for_without_a_look_at_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_study(space(tmp_path), tmp_path)
    study = optuna.load_study(
        study_name=place.name, storage=place.storage, sampler=optuna.samplers.RandomSampler()
    )
    look = mock.Mock(return_value=[])
    replayed = type(place.storage._replay_result)  # type: ignore[attr-defined]
    monkeypatch.setattr(replayed, "get_all_trials", look)
    create_trial(study, {"number": 0})
    look.assert_not_called()
    study.get_trials(deepcopy=False)
    look.assert_called_once()


def test_what_was_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = ask(space(tmp_path), tmp_path)
    read = mock.Mock(side_effect=AssertionError("the file is read"))
    with monkeypatch.context() as patched:
        patched.setattr(JournalFileBackend, "read_logs", read)
        trial = study.ask({"lr_mp": optuna.distributions.FloatDistribution(0, 1)})
        trial.set_user_attr("values", {"lr_mp": (1, None), "steps": {3: 0.5}})
        trial.report(0.5, step=300)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("late", 1)
        study.ask()
    place = open_study(space(tmp_path), tmp_path)
    again = optuna.load_study(study_name=place.name, storage=place.storage)
    assert again.trials == study.trials and len(study.trials) == 3


def test_a_results_folder_keeps_its_id(tmp_path: Path) -> None:
    one = open_study(space(tmp_path), tmp_path).search_id
    assert open_study(space(tmp_path), tmp_path).search_id == one
    (tmp_path / "other").mkdir()
    assert open_study(space(tmp_path), tmp_path / "other").search_id != one


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"epochs": 2}, "base.epochs: 5 there, 2 here"),
        ({"objective.metric": "val_loss", "objective.mode": "min"}, "objective.metric: "),
        ({"search.warmup_ratio": "default"}, "search.warmup_ratio.uniform: None there"),
    ],
)
def test_a_study_of_another_space_is_refused(
    tmp_path: Path, changed: dict[str, Any], difference: str
) -> None:
    open_study(space(tmp_path), tmp_path)
    more: dict[str, Any] = {"budget.trials": 99, "sampler.seed": 3}  # of these it may be another
    open_study(space(tmp_path, **more), tmp_path)
    with pytest.raises(UserError, match="is the study of another space") as refused:
        open_study(space(tmp_path, **changed), tmp_path)
    assert difference in str(refused.value)


def test_a_study_that_is_older_than_a_key_had_its_default(tmp_path: Path) -> None:
    location = open_study(space(tmp_path), tmp_path)
    study = location.load()
    older = {k: v for k, v in study.user_attrs[SPACE_OF].items() if k != "base.vlm.generation"}
    study.set_user_attr(SPACE_OF, older)
    open_study(space(tmp_path), tmp_path)
    del older["base.epochs"]
    study.set_user_attr(SPACE_OF, older)
    with pytest.raises(UserError, match=r"differs in base\.epochs: 5 there, 2 here"):
        open_study(space(tmp_path, epochs=2), tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://me:hush@127.0.0.1:1/db", "postgresql+psycopg://me:***@127.0.0.1:1"),
        ("postgresql+psycopg://127.0.0.1:1/db?user=me&password=hush", "?user=me&password=***"),
        ("nonsense", "must be the URL of a database"),
        ("oracle+nosuchdriver://me:hush@127.0.0.1/db", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_reached(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(UserError, match=r"study\.storage: ") as refused:
        open_study(space(tmp_path, **{"study.storage": url}), tmp_path)
    assert message in str(refused.value)
    assert "hush" not in str(refused.value)


def test_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"study\.storage: must not be SQLite"):
        space(tmp_path, **{"study.storage": "sqlite:///study.db"})
    monkeypatch.setenv("DATABASE_URL", "sqlite:///study.db")
    with pytest.raises(UserError, match=r"study\.storage: must not be SQLite"):
        open_study(space(tmp_path, **{"study.storage": "${DATABASE_URL}"}), tmp_path)
