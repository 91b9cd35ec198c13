"""Results in a bucket of S3: a server on this machine stands in for Amazon's."""

import functools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

from nanovlm.__main__ import main
from nanovlm.cluster.worker import RunTrial
from nanovlm.commands import dashboard
from nanovlm.config.space import load_space
from nanovlm.errors import RunFailed, UserError
from nanovlm.files import shown
from nanovlm.messages import Job, Report
from nanovlm.resources import Resources
from nanovlm.results.folder import choose_folder
from nanovlm.results.load import load_results
from nanovlm.results.mirror import ORDER, Mirror
from nanovlm.results.read import read_records
from nanovlm.results.remote import RemoteFolder, open_remote
from nanovlm.search.plan import SearchPlan
from nanovlm.search.run import run_plan
from nanovlm.search.study import ReadOnlyStudy
from nanovlm.training.meter import OnUpdate
from nanovlm.watch import bucket
from nanovlm.watch.bucket import results_in
from tests.fake_hub import FakeHub
from tests.processes import output_of, wait_until
from tests.programs.conftest import start_program
from tests.results.starts import DATA
from tests.results.whole_folders import make_whole_search
from tests.search.fake_trials import pretend
from tests.worker_threads import worker_threads

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

NUM_TRIALS = 6

SPACE = f"""
preset: digits
search: {{lr_mp: {{log_uniform: [1.0e-4, 1.0e-1]}}}}
scheduler: {{name: asha, rungs: 3, reduction_factor: 3}}
budget: {{trials: {NUM_TRIALS}}}
confirm: {{top: 0}}
"""


class Server:
    """An S3 server with one bucket, which can be away for a while."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        urlopen(Request(f"http://127.0.0.1:{self.port}/moto-api/reset", method="POST")).close()
        at = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http"}
        S3FileSystem(region="us-east-1", allow_bucket_creation=True, **at).create_dir("bucket")
        self.query = "?" + "&".join(f"{key}={value}" for key, value in at.items())

    def uri(self, path: str) -> str:
        return f"s3://bucket/{path}{self.query}"

    def leave(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Return a server that this process and what it starts may use, without long pauses."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "_PAUSE_SECONDS", 0.1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    server = Server()
    yield server
    server.leave()


class Killed:
    """Trials; when the last one begins, what is in the bucket is kept, as if the program were
    killed then. The copying goes on meanwhile, the search after it."""

    def __init__(self, running: RemoteFolder, killed: RemoteFolder) -> None:
        self._running, self._killed = running, killed

    def __call__(
        self, job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate
    ) -> Generator[Report, None, None]:
        if job.number == NUM_TRIALS - 1 and not self._killed.files():
            assert wait_until(lambda: "trials.jsonl" in self._running.files(), seconds=20)
            # In the order in which nothing is newer than what it depends on, as `Mirror` reads.
            names = self._running.files()
            for name in sorted(names, key=lambda name: ORDER.index(name.split("/")[0]))[::-1]:
                self._killed.put(name, self._running.read(name))
        yield from pretend(job, resources, interrupted)


def search(
    uri: str, tmp_path: Path, is_resumed: bool, run_trial: RunTrial = pretend
) -> Mapping[str, Any]:
    """Run the search in a folder of the bucket; return the summary."""
    (tmp_path / "space.yaml").write_text(SPACE)
    data = {part: {**DATA[part], "folder": part} for part in DATA}
    plan = SearchPlan(load_space(tmp_path / "space.yaml"), (100, 300), 900, data)
    with results_in(uri, "demo", is_resumed) as (folder, copiers):
        return run_plan(
            plan,
            folder / "demo",
            resume=is_resumed,
            concurrency=1,
            observers=copiers,
            start_workers=functools.partial(worker_threads, run_trial=run_trial),
        ).summary


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_goes_on_from_what_is_in_the_bucket(s3: Server, tmp_path: Path) -> None:
    whole, killed = (open_remote("x", s3.uri(f"{name}/demo")) for name in ("whole", "killed"))
    summary = search(s3.uri("whole"), tmp_path, False, Killed(whole, killed))
    records = {}
    assert 0 < len(killed.read("trials.jsonl").splitlines()) < NUM_TRIALS, "it was cut off"
    resumed = search(s3.uri("killed"), tmp_path, True)
    for remote in (whole, killed):
        folder = tmp_path / remote.path.replace("/", "-")
        remote.download(folder, remote.files())
        records[remote.path] = [
            (r.number, r.state, r.parameters, [report.metrics for report in r.reports])
            for r in sorted(read_records(folder), key=lambda r: r.number)
        ]
        address = remote.address("best.yaml").replace("'", "")
        assert f"--config '{address}'" in (folder / "best.yaml").read_text()
    assert len(records["bucket/whole/demo"]) == NUM_TRIALS
    assert records["bucket/whole/demo"] == records["bucket/killed/demo"]
    assert resumed["best"]["config"] == summary["best"]["config"]
    assert not [*(tmp_path / "tmp").glob("nanovlm-*")], "the local folders are gone"


def test_names_are_chosen_by_what_is_in_the_bucket(s3: Server) -> None:
    open_remote("x", s3.uri("results")).put("demo/space.yaml", b"")
    with results_in(s3.uri("results"), "demo", is_resumed=False) as (folder, _):
        assert shown(choose_folder(folder, None, "demo")) == s3.uri("results/demo-2")
    with (
        pytest.raises(UserError, match=r"--name: s3://bucket/results/demo holds results already"),
        results_in(s3.uri("results"), "demo", is_resumed=False) as (folder, _),
    ):
        choose_folder(folder, "demo", "demo")
    assert open_remote("x", s3.uri("results")).files() == ["demo/space.yaml"]
    with results_in(Path("here"), "demo", is_resumed=True) as (folder, observers):
        assert (folder, observers) == (Path("here"), ())


def test_a_bucket_that_is_away_is_told_and_made_up_for(s3: Server) -> None:
    with results_in(s3.uri("results"), "demo", is_resumed=False) as (folder, (copier,)):
        s3.leave()
        (folder / "demo").mkdir()
        (folder / "demo" / "trials.jsonl").write_text("1\n")
        assert wait_until(lambda: copier.problem is not None, seconds=30)
        assert str(copier.problem).startswith("s3://bucket/results: copying fails and is tried")
        assert list(copier.notes) == []
        s3.come_back()
    assert open_remote("x", s3.uri("results/demo")).read("trials.jsonl") == b"1\n"


def test_results_that_cannot_be_copied_at_last_are_kept_here(s3: Server) -> None:
    with (
        pytest.raises(RunFailed) as raised,
        results_in(s3.uri("results"), "demo", is_resumed=False) as (folder, _),
    ):
        s3.leave()
        (folder / "demo").mkdir()
        (folder / "demo" / "trials.jsonl").write_text("1\n")
        raise RunFailed(f"something else in {folder}/demo")
    first, last = str(raised.value).splitlines()
    assert first == "something else in s3://bucket/results/demo"
    assert last.startswith("s3://bucket/results: the last results could not be copied there: ")
    assert last.endswith(
        f"They are in {folder}/demo: copy them, or go on with --results {folder} and --resume"
    )
    assert (folder / "demo" / "trials.jsonl").read_text() == "1\n"
    s3.come_back()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://none/results{}", "there is no bucket 'none'"),
        ("s3://bucket/results{}&color=red", "unknown: color; choices: endpoint_override, region"),
        ("s3://me:secret@bucket/results{}", "a URI must not hold credentials"),
        ("s3:///results{}", "it names no bucket"),
        ("ftp://host/results{}", "Unrecognized filesystem type"),
        ("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http", "Could not connect to server"),
    ],
)
def test_a_place_that_cannot_be_used(s3: Server, uri: str, message: str) -> None:
    began_at = time.monotonic()
    with pytest.raises(UserError, match=r"^--results: ") as raised:
        open_remote("--results", uri.format(s3.query), will_write=True)
    assert message in str(raised.value)
    assert time.monotonic() - began_at < 100, "ten seconds, where nobody else is at work"


def test_what_is_in_a_bucket_is_read_from_there(
    s3: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, uri = make_whole_search(tmp_path / "search"), s3.uri("results/search")
    Mirror(folder, open_remote("x", uri)).update()
    assert load_results(uri).trials.equals(load_results(folder).trials)
    open_remote("x", uri).remove("report.html")
    assert main(["report", uri]) == 0
    assert capsys.readouterr().out == f"s3://bucket/results/search/report.html{s3.query}\n"
    assert open_remote("x", uri).read("report.html")
    with pytest.raises(UserError, match="there is nothing at s3://bucket/results/other"):
        load_results(s3.uri("results/other"))


def test_a_model_in_a_bucket_is_pushed_with_what_is_known_of_it(
    s3: Server, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri = make_whole_search(tmp_path / "search"), s3.uri("results/search")
    Mirror(folder, open_remote("x", uri)).update()
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_for_tests")
    cards = []
    for place in (str(folder / "best"), s3.uri("results/search/best")):
        assert main(["push", "--repo", "me/vlm", "--checkpoint", place]) == 0
        *_, files = hub.repositories["model", "me/vlm"].commits.values()
        cards.append(files["README.md"])
    assert cards[0] == cards[1]
    with pytest.raises(UserError, match="--checkpoint: there is nothing at s3://bucket/results/x"):
        main(["push", "--repo", "me/vlm", "--checkpoint", s3.uri("results/x")])


def test_a_study_in_a_bucket_is_shown(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna_dashboard")
    folder, uri = make_whole_search(tmp_path / "search"), s3.uri("results/search")
    Mirror(folder, open_remote("x", uri)).update()
    monkeypatch.setattr(dashboard._Server, "serve_forever", lambda self: None)
    monkeypatch.setattr("os.nice", lambda increment: 0)
    shown = list[list[dict[str, Any]]]()

    def show(study: ReadOnlyStudy) -> Any:
        shown.append([trial.params for trial in study.get_all_trials(dashboard.id_of(study))])
        return dashboard_application(study)

    dashboard_application = dashboard.dashboard_application
    monkeypatch.setattr(dashboard, "dashboard_application", show)
    for place in (str(folder), uri):
        assert main(["dashboard", place]) == 0
        assert f"{place}, read-only: http://127.0.0.1:" in capsys.readouterr().out.replace("\n", "")
    here, there = shown
    assert here == there != []


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder for TMPDIR, where sockets with long paths find no room."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_program_names_the_bucket_alone(s3: Server, tmp_path: Path, short_folder: Path) -> None:
    arguments = ("--preset", "digits", "data_cutoff_idx=60", "epochs=1", "batch_size=16")
    started = start_program(
        "run_single.py", *arguments, "--results", s3.uri("results"), cwd=tmp_path,
        TMPDIR=str(short_folder), RAY_TMPDIR="/tmp",
    )  # fmt: skip
    output = output_of(started)
    assert started.returncode == 0, output
    assert f"results: {s3.uri('results/single')}\n" in output
    assert f"report: {s3.uri('results/single/report.html')}\n" in output
    assert str(short_folder) not in output
    assert not [path for path in short_folder.iterdir() if path.name.startswith("nanovlm-results")]
    remote = open_remote("x", s3.uri("results/single"))
    assert {"trials.jsonl", "best/model.safetensors", "logs/driver.log"} <= {*remote.files()}
