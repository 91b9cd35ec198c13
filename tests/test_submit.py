"""What `--submit` checks before it hands a job over, and what it uploads."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

import run_search
from nanovlm import cli
from nanovlm.cluster.jobs import auth_headers, check_dashboard
from nanovlm.commands.submit import exit_code, other_words, stage
from nanovlm.errors import UserError

REPOSITORY = Path(__file__).parents[1]
SPACE = "preset: digits\nsearch: {lr_mp: default}\nbudget: {trials: 2}\n"


class Dashboard(BaseHTTPRequestHandler):
    """Answers what the server's `answer` says; 401 to who does not know its token."""

    def do_GET(self) -> None:
        code, text = self.server.answer  # type: ignore[attr-defined]
        if self.headers["Authorization"] != "Bearer right":
            code = 401
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_dashboard_is_asked_before_anything_is_sent(dashboard: HTTPServer) -> None:
    address, right = f"http://127.0.0.1:{dashboard.server_port}", {"Authorization": "Bearer right"}
    version = metadata.version("ray")
    cases = {
        (200, json.dumps({"ray_version": version})): None,
        (200, json.dumps({"ray_version": "2.9.3"})): f"runs Ray 2.9.3 and this machine {version}",
        (200, "<html>"): "no Ray dashboard answers",
        (200, "[]"): "no Ray dashboard answers",
        (404, ""): "no Ray dashboard at",
    }
    for answer, message in cases.items():
        dashboard.answer = answer  # type: ignore[attr-defined]
        if message is None:
            check_dashboard(address, right)
        else:
            with pytest.raises(UserError, match=message):
                check_dashboard(address, right)
    with pytest.raises(UserError, match=r"refuses a request without a token: .*RAY_AUTH_TOKEN"):
        check_dashboard(address, {})
    with pytest.raises(UserError, match="refuses the token"):
        check_dashboard(address, {"Authorization": "Bearer wrong"})


def test_the_token_is_found_where_ray_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth_headers() == {}
    for place, token in ((".ray/auth_token", "one"), ("elsewhere", "two")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(f"{token}\n")
        if place == "elsewhere":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / place))
        assert auth_headers() == {"Authorization": f"Bearer {token}"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "three")
    assert auth_headers() == {"Authorization": "Bearer three"}


def test_a_job_gets_the_programs_and_the_files_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "spaces").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for name in ("spaces/a.yaml", "mine.yaml", "notes.txt", "../b.yaml"):
        Path(name).write_text(name)
    target = tmp_path / "target"
    words = stage(target, {"--space": Path("spaces/a.yaml")}, "mine.yaml")
    assert words == ["--space", "spaces/a.yaml"]
    top = {path.name for path in target.iterdir()}
    assert top == {"nanovlm", "run_search.py", "run_single.py", "spaces", "mine.yaml"}
    source, copied = (
        {str(p.relative_to(root)) for p in (root / "nanovlm").rglob("*") if p.suffix != ".pyc"}
        for root in (REPOSITORY, target)
    )
    assert copied == {name for name in source if not name.endswith("__pycache__")}

    again = tmp_path / "again"  # from outside the folder, and a preset that has no file
    assert stage(again, {"--space": Path("../b.yaml")}, "digits") == ["--space", "given/b.yaml"]
    assert (again / "given/b.yaml").read_text() == "../b.yaml"


def test_all_other_arguments_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--sp", "x.yaml", "epochs=2", "--name=a b", "--subm=http://h:8265", "--no-confirm"]
    monkeypatch.setattr("sys.argv", ["run_search.py", *given, "lr_mp=1e-3"])
    rest = ["epochs=2", "--name=a b", "--no-confirm", "lr_mp=1e-3"]
    assert other_words({"--space": Path("x.yaml")}) == rest


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, cli.DONE),
        ("STOPPED", None, cli.INTERRUPTED),
        ("FAILED", 130, cli.INTERRUPTED),
        ("FAILED", 2, cli.WRONG_INPUT),
        ("FAILED", 1, cli.FAILED),
        ("FAILED", -9, cli.FAILED),
        ("FAILED", None, cli.FAILED),
    ],
)
def test_the_exit_code_is_that_of_the_job(status: str, code: int | None, expected: int) -> None:
    assert exit_code(status, code) == expected


def test_mistakes_are_found_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SPACE)
    Path("data").mkdir()
    for extra, message in (
        ([], "--results: must be an absolute path in a Ray job, got 'results'"),
        (["--results=/r", "--address=auto"], "--submit: cannot stand beside --address"),
        (["--results=/r", "--name=a/b"], "--name: must be the plain name of a folder"),
        (["--results=/r", "train_dataset_path=data"], "train_dataset_path: data is at a relative"),
        (["--results=/r", "warm_start=[data]"], "warm_start: data is at a relative path"),
        (["--results=/r", "study.storage=postgresql://me:pw@h/d"], "write \\${NANOVLM_DB_PASSWORD"),
        (["--results=/r", "epochs=0"], "epochs"),
        (["--results=/r"], "http://HEAD:8265, got 'ray://h'"),
    ):
        words = ["run_search.py", "--space", "s.yaml", "--submit", "ray://h", *extra]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(UserError, match=message):
            run_search.main()


def test_a_model_that_only_the_cluster_has_is_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text(SPACE)
    words = ["run_search.py", "--space", str(tmp_path / "s.yaml"), "--results=/r"]
    words += ["preset=nanovlm-222m", "vlm.lm_model_type=/models/of/the/cluster"]
    monkeypatch.setattr("sys.argv", [*words, "--submit=ray://h"])
    with pytest.raises(UserError, match="http://HEAD:8265, got 'ray://h'"):
        run_search.main()
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="/models/of/the/cluster"):
        run_search.main()
