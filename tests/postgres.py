"""A real PostgreSQL on loopback, in a folder of its own, that tests start and stop."""

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOBODY = 65534


class Database:
    """A server in a folder of its own, which root may not run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        self._call("initdb", "-D", str(folder / "data"), "-U", "me", "--auth=trust")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://me:hush@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -h 127.0.0.1"
        log = str(self._folder / "log")
        self._call("pg_ctl", "-D", str(self._folder / "data"), "-o", options, "-l", log, "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "stop")

    def _call(self, *command: str) -> None:
        as_nobody: dict[str, Any] = {}
        if os.getuid() == 0:
            as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        with (self._folder.parent / "calls.log").open("ab") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=log, cwd=self._folder, **as_nobody
            )


@contextlib.contextmanager
def started_database() -> Iterator[Database]:
    """Yield a server that runs, and ends with the context."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        place = Path(folder) / "server"
        place.mkdir()
        server = Database(place)
        server.start()
        try:
            yield server
        finally:
            server.stop()
