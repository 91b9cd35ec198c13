"""Results of jobs: where they must not lie, and which a job goes on with that is begun again."""

from pathlib import Path

import pytest

from nanovlm.errors import UserError
from nanovlm.results.folder import check_kept, choose_folder, has_begun, locked


def test_results_of_a_job_are_not_put_where_ray_removes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_folder(Path("results"), "a", "b") == Path("results/a")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"--results: must be an absolute path .* 'results'"):
        choose_folder(Path("results"), "a", "b")
    assert choose_folder(Path("/nowhere"), "a", "b") == Path("/nowhere/a")
    with pytest.raises(UserError, match="an absolute path"):
        check_kept(Path("results"))


def test_a_run_is_gone_on_with_once_it_has_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not has_begun(folder)
    (folder / "logs").mkdir(parents=True)  # as a program leaves it that is killed at once
    (folder / "logs" / "driver.log").touch()
    assert not has_begun(folder)
    assert not folder.exists(), "the run can be begun in it"
    folder.mkdir()
    (folder / "space.yaml").touch()
    assert has_begun(folder)


def test_a_folder_that_another_program_begins_in_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder), pytest.raises(UserError, match="another program works in this folder"):
        has_begun(folder)
    assert folder.exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    assert not has_begun(tmp_path)
    with pytest.raises(UserError, match="holds results already"):
        choose_folder(tmp_path.parent, tmp_path.name, "x")
