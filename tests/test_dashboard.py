"""Optuna's dashboard of a search that runs: in a browser, and beside the program that writes it."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import optuna
import pytest

from nanovlm.__main__ import main
from nanovlm.commands.dashboard import bind, read_only, read_space
from nanovlm.config.space import load_space
from nanovlm.errors import UserError
from nanovlm.results.read import STUDY_FILE
from nanovlm.samplers.configurations import suggest
from nanovlm.search.study import open_study
from tests.browser import chromium

REPOSITORY = Path(__file__).parents[1]
SPACE = "search: {lr_mp: {log_uniform: [1e-4, 1e-1]}, batch_size: {choice: [64, 128, 256]}}\n"
PAGES = {
    "": "0. search",
    "/studies/0": "Hyperparameter Importance",
    "/studies/0/analytics": "Slice",
    "/studies/0/trials": "Trial 0",
}
"""The pages of the dashboard, and what is read on them once the study is there."""

open_address = build_opener(ProxyHandler({})).open


class RunningSearch:
    """Writes the study of a results folder as a search does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "space.yaml").write_text(SPACE)
        self._space = load_space(folder / "space.yaml")
        place = open_study(self._space, folder)
        sampler = optuna.samplers.RandomSampler(seed=0)
        self.study = optuna.load_study(
            study_name=place.name, storage=place.storage, sampler=sampler
        )
        self.values: list[dict[str, Any]] = []

    def run_trials(self, num: int) -> None:
        for _ in range(num):
            trial = self.study.ask()
            self.values.append(suggest(self._space.parameters, trial))
            trial.report(0.25, step=100)
            self.study.tell(trial, 0.25 + 0.01 * trial.number)

    def journal(self) -> bytes:
        return (self.folder / STUDY_FILE).read_bytes()


@pytest.fixture
def search(tmp_path: Path) -> RunningSearch:
    search = RunningSearch(tmp_path / "demo")
    search.run_trials(5)
    return search


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> RunningSearch:
    """Return the search that `served` shows."""
    search = RunningSearch(tmp_path_factory.mktemp("served") / "demo")
    search.run_trials(5)
    return search


@pytest.fixture(scope="module")
def served(running: RunningSearch) -> Iterator[str]:
    """Return the address of the dashboard of `running`, at a port beside one that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "nanovlm",
                "dashboard",
                str(running.folder),
                "--port",
                str(port),
            ],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == f"port {port} is in use; another one was chosen\n"
            line = server.stdout.readline()
            assert line.startswith(f"{running.folder}, read-only: http://127.0.0.1:"), line
            assert server.stdout.readline() == "Ctrl-C ends it\n"
            yield line.split()[-1].removesuffix("/dashboard/studies/0")
            server.send_signal(signal.SIGINT)
            output, _ = server.communicate(timeout=30)
        finally:
            server.kill()
    assert output == "\nthe dashboard is closed\n"
    assert server.returncode == 0


def get(address: str) -> Any:
    with open_address(address) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_search_is_shown_while_it_runs(running: RunningSearch, served: str) -> None:
    before = running.journal()
    with chromium() as browser:
        page = browser.new_page()
        mistakes: list[str] = []
        requests: list[tuple[str, str]] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on(
            "console", lambda said: mistakes.extend([said.text] if said.type == "error" else [])
        )
        page.on("request", lambda request: requests.append((request.method, request.url)))
        for place, text in PAGES.items():
            page.goto(f"{served}/dashboard{place}")
            page.get_by_text(text, exact=True).first.wait_for()
            running.run_trials(1)
        last = len(running.values) - 1  # the best so far
        page.goto(f"{served}/dashboard/studies/0/trials?numbers={last}")
        page.get_by_text(f"Trial {last} (trial_id={last})").wait_for()
        body = " ".join(page.inner_text("body").split())
    assert "Best Trial" in body
    assert f"Value {0.25 + 0.01 * last:.2f} " in body
    assert f"batch_size {running.values[last]['batch_size']} " in body
    assert mistakes == []
    addresses = [address for _, address in requests if not address.startswith(("data:", "blob:"))]
    assert {method for method, _ in requests} == {"GET"}
    assert [address for address in addresses if not address.startswith(served)] == []
    assert running.journal().startswith(before)


@pytest.mark.slow
def test_the_page_follows_and_cannot_write(running: RunningSearch, served: str) -> None:
    for _ in range(2):
        running.run_trials(10)
        shown = get(f"{served}/api/studies/0")
        best = 0.25 + 0.01 * (len(running.values) - 1)
        assert shown["best_trials"][0]["values"] == [pytest.approx(best)]
        assert shown["best_trials"][0]["number"] == len(running.values) - 1
    assert shown["objective_names"] == ["mmstar_accuracy"]
    before = running.journal()
    for method, place, body in (
        ("POST", "/api/studies", {"study_name": "x", "directions": ["minimize"]}),
        ("POST", "/api/studies/0/rename", {"study_name": "x"}),
        ("DELETE", "/api/studies/0", {}),
        ("PUT", "/api/studies/0/note", {"version": 1, "body": "x"}),
        ("POST", "/api/trials/0/user-attrs", {"user_attrs": {"x": 1}}),
    ):
        request = Request(served + place, json.dumps(body).encode(), method=method)
        request.add_header("Content-Type", "application/json")
        with pytest.raises(HTTPError) as refused:
            open_address(request)
        assert refused.value.code == 403
        assert "read-only" in json.load(refused.value)["reason"]
    assert running.journal() == before
    assert {path.name for path in running.folder.iterdir()} == {
        "space.yaml",
        "study.id",
        STUDY_FILE,
    }


@pytest.mark.slow
def test_a_page_of_another_site_reads_nothing(served: str) -> None:
    """Its name may lead to this machine (DNS rebinding)."""
    port = served.rpartition(":")[2]
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]"):
        request = Request(f"{served}/api/studies", headers={"Host": host})
        assert open_address(request).status == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "0.0.0.0"):
        request = Request(f"{served}/api/studies", headers={"Host": host})
        with pytest.raises(HTTPError) as refused:
            open_address(request)
        assert refused.value.code == 403
        assert f"must be one of localhost, 127.0.0.1, [::1], got {host!r}" in (
            refused.value.read().decode()
        )


def test_a_folder_without_a_search_is_refused(tmp_path: Path, search: RunningSearch) -> None:
    with pytest.raises(UserError, match=r"no .*space.yaml. Searches beside it: .*/demo\.$"):
        main(["dashboard", str(tmp_path / "dmeo")])
    with pytest.raises(UserError, match="--storage: the study of this search is in a file"):
        read_space(search.folder, "postgresql://me@here/x")
    (search.folder / STUDY_FILE).unlink()
    with pytest.raises(UserError, match="has made no study yet"):
        main(["dashboard", str(search.folder)])


def test_the_package_is_optional(search: RunningSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[dashboard\]'"):
        main(["dashboard", str(search.folder)])


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_what_is_no_port_is_refused(
    search: RunningSearch, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", str(search.folder), "--port", port])
    assert ended.value.code == 2
    assert "must be a port from 1 to 65535" in capsys.readouterr().err


def test_the_server_is_open_to_this_machine_alone() -> None:
    with bind(18080, read_only(lambda environment, start: [])) as server:
        assert server.server_address[0] == "127.0.0.1"
