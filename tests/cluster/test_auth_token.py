"""Ray's token is for its user alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nanovlm.cluster.ray_cluster import AuthTokenGuard
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.watch.observer import RunStart


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    return tmp_path / "auth_token"


def guard(
    is_own_cluster: bool = True, start_ray: Callable[[], object] = lambda: None
) -> AuthTokenGuard:
    guard = AuthTokenGuard()
    start_ray()
    guard.begin(
        RunStart(
            folder=Path("results"),
            config=TrainConfig(),
            objective=Objective(),
            milestones=(),
            trial_samples=1,
            data={},
            is_own_cluster=is_own_cluster,
        )
    )
    return guard


def test_a_token_that_others_can_read_is_taken_from_them_and_that_is_said_once(token: Path) -> None:
    assert guard().notes == []  # there is none
    token.write_text("secret")
    token.chmod(0o644)
    assert guard(is_own_cluster=False).notes == []
    assert token.stat().st_mode & 0o777 == 0o644
    (note,) = guard().notes
    assert note.startswith(f"{token}, the token of Ray's clusters, was readable for other users")
    assert token.stat().st_mode & 0o777 == 0o600
    assert guard().notes == []
    assert token.read_text() == "secret"


def test_a_token_that_ray_has_just_made_is_worth_no_note(token: Path) -> None:
    def start_ray() -> None:
        token.write_text("secret")
        token.chmod(0o644)

    assert guard(start_ray=start_ray).notes == []
    assert token.stat().st_mode & 0o777 == 0o600
