"""Runs of W&B, read back from what was recorded; every program has a home of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any

import pytest

from nanovlm.config.schema import TrainConfig
from nanovlm.errors import UserError
from nanovlm.watch import wandb_runs
from nanovlm.watch.wandb_runs import WandbMode, WandbRuns, answers, check_wandb
from tests.watch.example_run import COMPLETED, ENDED, FAILED, STOPPED, follow_trial, start
from tests.watch.wandb_files import OfflineRun, offline_runs

REPOSITORY = Path(__file__).parents[2]
KEY = "0123456789" * 4


def run(folder: Path, stage: str = "all", **environment: str) -> dict[str, Any]:
    """Follow the example run in a process; return what it said, which is all that is printed."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.watch.follow", str(folder), stage],
        env={**mine, "HOME": str(folder.parent), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = dict(json.loads(done.stdout))
    assert answer["problem"] or not done.stderr, done.stderr
    return answer


def check_curves(runs: dict[str, OfflineRun]) -> None:
    assert set(runs) == {"trial-0000", "trial-0001", "trial-0002", "demo"}
    for record in ENDED:
        found = runs[record.trial_id]
        for metric in record.metrics:
            reported = [(r.samples_seen, r.metrics[metric]) for r in record.reports]
            assert found.curve(metric) == reported
        assert found.curve("speed/samples_per_second") == [
            (r.samples_seen, r.speed.samples_per_second) for r in record.reports if r.speed
        ]
        assert {key: found.config[key] for key in record.config} == record.config
        assert (found.run.run_group, found.run.job_type) == ("demo", "trial")
        assert (found.run.project, found.summary["state"]) == ("nanovlm", record.state)


@pytest.mark.slow
def test_offline_runs_hold_the_curves(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    answer = run(folder)
    assert answer["problem"] is None
    assert answer["told"] == [
        "W&B: offline, since there is no API key (`wandb login` or WANDB_API_KEY gives one). "
        f"To send the runs later: wandb sync {folder}/wandb/offline-run-*"
    ]
    runs = offline_runs(folder)
    check_curves(runs)
    live = runs["trial-0000"].curve("live/train_loss", against="live/samples_seen")
    assert live == [(samples, 1.5) for samples in (50, 150, 250, 350)]
    assert runs["trial-0000"].tags == ["completed"]
    assert runs["trial-0001"].tags == ["stopped", str(STOPPED.reason)[:64]]
    assert runs["trial-0002"].tags == ["failed", FAILED.reason]
    assert [runs[r.trial_id].exit_code for r in ENDED] == [0, 0, 1]
    assert runs["demo"].run.job_type == "search"
    assert runs["demo"].summary["best"]["trial_id"] == "trial-0000"
    assert runs["demo"].config["search"] == {"lr_mp": {"log_uniform": [1e-4, 1e-1]}}
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[:2] for row in rows] == [[r.trial_id, r.state] for r in ENDED]


@pytest.mark.slow
def test_a_search_that_goes_on_has_one_run_per_trial(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    run(folder, "interrupted")
    before = offline_runs(folder)
    assert set(before) == {"trial-0000", "trial-0001", "trial-0002", "demo"}
    assert before["trial-0001"].tags == ["interrupted"]
    assert before["trial-0002"].tags == ["paused"]
    assert before["trial-0002"].summary["state"] == "paused"
    (untouched,) = folder.glob(f"wandb/offline-run-*-{before['trial-0000'].run.run_id}")
    time_of_end = untouched.stat().st_mtime_ns

    run(folder, "resumed")
    after = offline_runs(folder)
    check_curves(after)
    assert untouched.stat().st_mtime_ns == time_of_end, "a finished trial is recorded twice"
    for name in before:
        assert after[name].run.run_id == before[name].run.run_id
    assert after["trial-0001"].tags[0] == "stopped"

    (folder / "wandb" / "finished-trials").unlink()  # killed between the trial's end and its record
    run(folder, "resumed")
    check_curves(offline_runs(folder))


@pytest.mark.slow
def test_without_network_nothing_waits_for_it(tmp_path: Path) -> None:
    with create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer = run(tmp_path / "demo", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert answer["told"][0].startswith(f"W&B: offline, since {url} does not answer. To send")
    assert answer["waited"] < 1, "the search waits"
    assert answer["ended"] < 15, "2 s for the check, and some for W&B's own start"
    check_curves(offline_runs(tmp_path / "demo"))


@contextmanager
def refusing_server() -> Iterator[str]:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_what_the_server_refuses_is_recorded_offline(tmp_path: Path) -> None:
    with refusing_server() as url:
        answer = run(tmp_path / "demo", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert answer["told"][0] == f"W&B: online, to {url}"
    assert answer["problem"].startswith("W&B: offline, since the server refuses runs: ")
    check_curves(offline_runs(tmp_path / "demo"))


@pytest.mark.slow
def test_the_users_mode_counts(tmp_path: Path) -> None:
    answer = run(tmp_path / "demo", WANDB_MODE="disabled")
    assert answer["told"] == ["W&B: disabled, as WANDB_MODE says"]
    assert answer["problem"] is None
    assert not list(tmp_path.glob("demo/wandb/*run-*"))


def test_whether_a_server_answers() -> None:
    with refusing_server() as url:
        assert answers(url)
    assert not answers(url)  # nobody listens any more
    assert not answers("http://host.invalid", seconds=0.2)
    with create_server(("127.0.0.1", 0)) as silent:
        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    observer = WandbRuns()
    observer.begin(start(tmp_path / "demo"))
    follow_trial(observer, COMPLETED)
    observer.end({})
    assert observer.problem is None
    assert not (tmp_path / "demo" / "wandb").exists()


@pytest.mark.parametrize("entity", ["my team", "https://wandb.ai/me", ""])
def test_an_entity_that_cannot_be_one(entity: str) -> None:
    check_wandb(TrainConfig(log_wandb=False, wandb_entity=entity))  # nobody asks for it
    with pytest.raises(UserError, match="wandb_entity: must be the name of a user or team"):
        check_wandb(TrainConfig(log_wandb=True, wandb_entity=entity))


def test_a_mode_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(UserError) as refused:
        check_wandb(TrainConfig(log_wandb=True))
    assert str(refused.value) == (
        "WANDB_MODE: must be one of online, offline, disabled, shared, dryrun, run, got 'of-line'"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WANDB_MODE": "online"}, "WANDB_MODE=online: there is no API key for W&B"),
        ({"WANDB_BASE_URL": "wandb"}, "log_wandb: W&B cannot use its settings"),
    ],
)
def test_settings_that_cannot_be_used(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    code = (
        "from nanovlm.config.schema import TrainConfig\n"
        "from nanovlm.watch.wandb_runs import check_wandb\n"
        "check_wandb(TrainConfig(log_wandb=True))"
    )
    mine = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**mine, "HOME": str(tmp_path), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert f"nanovlm.errors.UserError: {message}" in done.stderr


@pytest.mark.parametrize("content", ["", "\0\xff", "not an id"])
def test_a_damaged_id_is_not_that_of_other_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Two searches with empty files would have the same ids for all their runs."""
    monkeypatch.setattr(wandb_runs, "find_mode", lambda: WandbMode("offline", "so it was asked"))
    ids = set()
    for name in ("one", "other"):
        folder = tmp_path / name
        (folder / "wandb").mkdir(parents=True)
        (folder / "wandb" / "search-id").write_text(content)
        (folder / "wandb" / "finished-trials").write_bytes(b"trial-0000\n\xff\xfe")
        runs = WandbRuns()
        runs.begin(start(folder, log_wandb=True))
        runs._background.close(10.0)
        assert runs.problem is None
        ids.add(runs._run_id("trial-0000"))
    assert len(ids) == 2
