"""Look at a search in Optuna's dashboard while it runs, or afterwards."""

import argparse
import contextlib
import errno
import importlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna

from nanovlm import cli, process
from nanovlm.cluster.relay import VALUES
from nanovlm.config.database_url import fill_in
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_MODEL_DIR,
    CHECKPOINTS_DIR,
    LOGS_DIR,
    SPACE_FILE,
    STUDY_FILE,
    TENSORBOARD_DIR,
    FolderReader,
)
from nanovlm.results.remote import local_copy
from nanovlm.search.study import ReadOnlyStudy, show_study
from nanovlm.watch.terminal.console import PLAIN, make_console

EXAMPLES = """examples:
  python -m nanovlm dashboard results/digits
  python -m nanovlm dashboard results/digits --port 8090
  python -m nanovlm dashboard s3://BUCKET/PATH/digits

The page is read-only and open to this machine alone. From another one: ssh -L 8080:localhost:8080
"""

HOST = "127.0.0.1"
DEFAULT_PORT = 8080
_NOT_SHOWN = (ANSWERS_DIR, BEST_MODEL_DIR, CHECKPOINTS_DIR, LOGS_DIR, TENSORBOARD_DIR)
_MORE_PORTS = 20
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")
_REFUSAL = "The study is shown read-only: the search that writes it may be running."

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
"""What WSGI calls so: the environment of a request and a function that begins the response."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the terminal free of a line for every request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="results/NAME",
        help="the results folder of a search; of one in a bucket, what is there now is shown",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        help=f"default: {DEFAULT_PORT}; the next free one if it is in use",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="the database of study.storage, if its password is not in the environment",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve the dashboard until Ctrl-C."""
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UserError(
            "dashboard: needs a package that is not installed: pip install -e '.[dashboard]'"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = local_copy("dashboard", arguments.folder, without=_NOT_SHOWN)
    space = read_space(folder, arguments.storage)
    study = show_study(space, folder.resolve())
    server = bind(arguments.port, local_only(read_only(dashboard_application(study))))
    console = make_console()
    if server.server_port != arguments.port:
        console.print(f"port {arguments.port} is in use; another one was chosen", **PLAIN)
    address = f"http://{HOST}:{server.server_port}/dashboard/studies/{id_of(study)}"
    console.print(f"{arguments.folder}, read-only: {address}\nCtrl-C ends it", **PLAIN)
    for note in what_study_lacks(study, folder):
        console.print(f"note: {note}", **PLAIN)
    os.nice(10)  # the search comes first

    def end() -> None:  # in another thread than the server's, for which it waits
        threading.Thread(target=server.shutdown, daemon=True).start()

    with server, contextlib.suppress(KeyboardInterrupt), process.in_order(end):
        server.serve_forever()
    console.print("\nthe dashboard is closed", **PLAIN)
    return cli.DONE


def read_space(folder: Path, storage: str | None) -> SearchSpace:
    """Return the space of a results folder, with the database that its study is in.

    Raises:
        UserError: it is not the folder of a search, or the database's password is missing.
    """
    path = folder / SPACE_FILE
    if not path.exists():
        others = ", ".join(sorted(str(p.parent) for p in folder.parent.glob(f"*/{SPACE_FILE}")))
        searches = f" Searches beside it: {others}." if others else ""
        raise UserError(f"{folder}: is not the results folder of a search, no {path}.{searches}")
    reader = FolderReader(folder)
    space = reader.space(())
    reader.raise_if_damaged()
    assert space is not None, "it is there and not damaged"
    kept = space.study.storage
    if storage is None and kept is not None:
        _check_password(kept)
    if storage is not None and kept is None:
        raise UserError("--storage: the study of this search is in a file of the results folder")
    return space if storage is None else load_space(path, {"study.storage": storage})


def _check_password(storage: str) -> None:
    """Raise UserError if a URL that was written down lacks its password."""
    if ":***@" in storage:  # by an earlier version
        raise UserError(f"--storage: the study is in {storage}: give the URL with its password")
    try:
        fill_in(storage)
    except UserError as error:
        raise UserError(f"{error}; or give the URL with its password to --storage") from None


def id_of(study: ReadOnlyStudy) -> int:
    """Return the id of the one study in the storage."""
    (shown,) = study.get_all_studies()
    return study.get_study_id_from_name(shown.study_name)


def what_study_lacks(study: ReadOnlyStudy, folder: Path) -> list[str]:
    """Return what the folder's files say of its trials and the study does not, or what is wrong
    with them."""
    reader = FolderReader(folder)
    records, _ = reader.ended()
    trials = study.get_all_trials(id_of(study), deepcopy=False)
    values = [trial.user_attrs[VALUES] for trial in trials if VALUES in trial.user_attrs]
    lost = sum(record.parameters not in values for record in records)
    notes = [*reader.problems, *reader.notes]
    if lost:
        where = "--resume of the search makes up for them"
        notes.append(f"{folder / STUDY_FILE}: lacks {lost} of {len(records)} trials; {where}")
    return notes


def dashboard_application(study: ReadOnlyStudy) -> Application:
    package = importlib.import_module("optuna_dashboard")  # an optional one
    application: Application = package.wsgi(study)
    return application


def read_only(application: Application) -> Application:
    """Return the application without the requests that change something (notes, renaming, ...)."""

    def readable(
        environment: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] in ("GET", "HEAD"):
            return application(environment, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [json.dumps({"reason": _REFUSAL}).encode()]

    return readable


def local_only(application: Application) -> Application:
    """Return the application for requests that name this machine by its loopback address.

    A page of another site may have its own name lead to 127.0.0.1 (DNS rebinding), so that the
    browser lets it read what is served here. Its requests have that name in the header Host.
    """

    def local(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host = environment.get("HTTP_HOST", "")
        if _PORT.sub("", host).lower() in _OWN_NAMES:
            return application(environment, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [
            f"Host: must be one of {', '.join(_OWN_NAMES)}, got {host!r}: this page is for "
            "programs on this machine. From another one: ssh -L 8080:localhost:8080 HOST\n".encode()
        ]

    return local


def bind(port: int, application: Application) -> WSGIServer:
    """Return a server of the application at the port, or at the next one that is free.

    Raises:
        UserError: the port may not be used, or so many after it are in use.
    """
    last = min(port + _MORE_PORTS, 65535)
    for candidate in range(port, last + 1):
        try:
            return make_server(
                HOST, candidate, application, server_class=_Server, handler_class=_QuietHandler
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"--port: {candidate} cannot be used: {error.strerror}; choose one above 1023"
                ) from None
    raise UserError(f"--port: {port} and all to {last} are in use; choose another")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 1 to 65535, got {text!r}")
    return int(text)
