"""The token of Ray's clusters: whoever has it can run code on one, so nobody else may read it."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from nanovlm.observer import Observer, RunStart

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class AuthTokenGuard(Observer):
    """Takes the token's file from others, for whom Ray leaves it readable, and says so once."""

    def __init__(self) -> None:
        self._notes: list[str] = []

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def begin(self, start: RunStart) -> None:
        path = token_file()
        if not start.is_own_cluster or not path.is_file():
            return
        status = path.stat()
        if status.st_uid == os.getuid() and status.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
            self._notes.append(
                f"{path}, the token of Ray's clusters, was readable for other users of this machine"
                "; it no longer is"
            )


def token_file() -> Path:
    """Return where Ray has its token, unless an environment variable holds that itself."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path.home() / ".ray" / "auth_token"
