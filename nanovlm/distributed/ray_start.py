"""Starts Ray or joins it, and says in one message why that cannot be.

Ray itself would try for minutes, or end with a traceback of its own files.
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services

from nanovlm.errors import UserError

_CONNECT_SECONDS = 5

_SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""The longest socket of Ray below its folder."""
_LONGEST_SOCKET = 107 if sys.platform == "linux" else 103
"""Bytes of a socket's path that the system takes."""
_FREE_BYTES = 200 * 2**20
"""What Ray needs for its logs, a search of a day included."""

_ELSEWHERE = "RAY_TMPDIR=FOLDER has Ray use another folder"


def start_ray(address: str | None) -> Any:
    """Start a cluster, or join the one at `address`; return what `ray.init` does.

    Raises:
        UserError: it cannot be; gives the reason and what helps.
    """
    if address:
        _check_reachable(address)
    else:
        _check_temporary_folder(Path(get_default_ray_temp_dir()))
    try:
        return ray.init(
            address=address or "local",
            include_dashboard=None if address else True,
            log_to_driver=False,
            configure_logging=False,  # see driver_log.py
        )
    except Exception as error:
        raise UserError(_explain_join(address, error) if address else _explain(error)) from error


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at `address`."""
    try:
        target = services.canonicalize_bootstrap_address_or_die(address)
        host, _, port = target.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--address: no Ray cluster answers at {address!r}: {error}") from None


def _check_temporary_folder(folder: Path) -> None:
    """Raise UserError if Ray cannot use the folder for its sockets and logs."""
    room = _LONGEST_SOCKET - len(f"/{_SOCKET.format(pid=os.getpid())}")
    length = len(os.fsencode(folder))
    if length > room:
        raise UserError(
            f"TMPDIR: Ray makes sockets in {folder}, whose path must not exceed {room} bytes, got "
            f"{length}; RAY_TMPDIR=/tmp gives Ray a shorter one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"TMPDIR: Ray cannot use {folder}: {error.strerror}; {_ELSEWHERE}"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"TMPDIR: Ray cannot use {folder}: it may not be written; {_ELSEWHERE}")
    if free < _FREE_BYTES:
        raise UserError(
            f"TMPDIR: Ray needs {_FREE_BYTES / 1e6:.0f} MB for its logs in {folder}, where "
            f"{free / 1e6:.0f} MB are free; {_ELSEWHERE}"
        )


def _explain(error: Exception) -> str:
    """Return why no cluster could be started."""
    reason = _first_line(error)
    help = f"Ray's logs are in {get_default_ray_temp_dir()}/session_latest/logs"
    if isinstance(error, OSError) and error.filename:
        help = _ELSEWHERE
    if "object store" in reason:
        help = "make /dev/shm larger (docker run --shm-size=4g), or free memory"
    return f"Ray cannot be started: {reason}; {help}"


def _explain_join(address: str, error: Exception) -> str:
    """Return why the cluster could not be joined."""
    if "mismatch" in str(error):
        detail = " ".join(str(error).split())
        return (
            f"--address: the Ray cluster at {address!r} is of another version, and all machines "
            f"need the same packages: {detail}"
        )
    return (
        f"--address: no Ray cluster answers at {address!r}: {_first_line(error)}. For a cluster "
        "that asks for a token, set RAY_AUTH_MODE=token and have the token in ~/.ray/auth_token"
    )


def _first_line(error: Exception) -> str:
    """Return what an error says first; Ray appends whole logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:") if lines else type(error).__name__
