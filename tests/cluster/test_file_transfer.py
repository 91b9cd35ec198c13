"""Files of trials on nodes that do not share the results folder."""

import logging
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from nanovlm.cluster import transfer
from nanovlm.cluster.file_server import CHUNK_BYTES, FileAccess, FileServer, served_files
from nanovlm.cluster.logs import LogRelay
from nanovlm.cluster.relay import job_in
from nanovlm.cluster.transfer import NodeFiles, node_files
from nanovlm.files import Version, find_full_disk
from nanovlm.messages import Job, ProgressUpdate, Report
from nanovlm.training.meter import OnUpdate, ignore
from tests.cluster.file_servers import BusyServer, FullServer, random_bytes, write
from tests.cluster.short_trials import CONFIG, report, update

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

TRIAL = "trial-0000"
STATE, ANSWERS = f"checkpoints/{TRIAL}.state/state.safetensors", f"answers/{TRIAL}.jsonl"
MODEL = f"checkpoints/{TRIAL}/model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "logs").mkdir(parents=True)
    return folder


@pytest.fixture
def access(folder: Path) -> Iterator[FileAccess]:
    with served_files(folder, is_own_cluster=False) as access:
        assert access is not None
        yield access


def write_state(job: Job, content: bytes) -> None:
    write(f"{job.state_dir}/state.safetensors", content)


class Node:
    """A node that runs one trial, which writes what the test wants it to."""

    def __init__(self, access: FileAccess, scratch: Path, lease: int, on_update: OnUpdate = ignore):
        scratch.mkdir()
        self.scratch = scratch
        self.do: Callable[[Job, OnUpdate], object] = lambda job, on_update: None
        """Called before each report."""
        files = NodeFiles(access, scratch, fetches=True)
        job = job_in(Path(access.folder), TRIAL, config=CONFIG)
        self.reports = files.run(self._trial, job, lease, on_update)

    def _trial(self, job: Job, on_update: OnUpdate) -> Generator[Report, None, None]:
        assert job == replace(job_in(self.scratch, TRIAL, config=CONFIG)), (
            "each file is where it is in the results folder"
        )
        while True:
            self.do(job, on_update)
            yield report(0)

    def next_report(self, do: Callable[[Job, OnUpdate], object]) -> None:
        self.do = do
        next(self.reports)


def test_files_are_in_the_results_folder_before_their_report(
    access: FileAccess, folder: Path, tmp_path: Path
) -> None:
    node = Node(access, tmp_path / "node", lease=3)

    def begin(job: Job, on_update: OnUpdate) -> None:
        write_state(job, random_bytes(1))
        write(job.answers_file, b"")

    node.next_report(begin)
    assert (folder / STATE).read_bytes() == random_bytes(1)
    assert (folder / ANSWERS).read_bytes() == b""
    before = (folder / STATE).stat()
    node.next_report(lambda job, on_update: write(job.answers_file, b"A"))
    assert (folder / ANSWERS).read_bytes() == b"A"
    assert (folder / STATE).stat() == before, "what is there is not sent again"
    node.next_report(lambda job, on_update: write(f"{job.output_dir}/{Path(MODEL).name}", b"M"))
    assert (folder / MODEL).read_bytes() == b"M"
    node.next_report(lambda job, on_update: write_state(job, random_bytes(2, CHUNK_BYTES)))
    assert (folder / STATE).read_bytes() == random_bytes(2, CHUNK_BYTES)
    assert not [*folder.rglob("*.part")]
    node.reports.close()
    assert not [*node.scratch.iterdir()]


def test_a_trial_goes_on_from_its_state_on_another_node(
    access: FileAccess, folder: Path, tmp_path: Path
) -> None:
    found = list[bytes]()
    write(str(folder / STATE), random_bytes(1))
    sent = Version.of(folder / STATE)
    node = Node(access, tmp_path / "next", lease=1)
    node.next_report(
        lambda job, on_update: found.append(
            Path(f"{job.state_dir}/{Path(STATE).name}").read_bytes()
        )
    )
    assert found == [random_bytes(1)]
    assert Version.of(folder / STATE) == sent, "what came from there is not sent back"
    node.reports.close()


def test_a_group_that_has_lost_its_trial_changes_nothing(
    access: FileAccess, folder: Path, tmp_path: Path
) -> None:
    late = Node(access, tmp_path / "late", lease=1)
    late.next_report(lambda job, on_update: write_state(job, b"by the first"))
    now = Node(access, tmp_path / "now", lease=2)
    now.next_report(lambda job, on_update: None)
    late.next_report(lambda job, on_update: write_state(job, b"by the first, later"))
    assert (folder / STATE).read_bytes() == b"by the first"
    now.next_report(lambda job, on_update: write_state(job, b"by the second"))
    assert (folder / STATE).read_bytes() == b"by the second"
    assert not [*folder.rglob("*.part")]
    late.reports.close()
    now.reports.close()


def test_a_worker_that_is_killed_leaves_no_half_file(folder: Path) -> None:
    server = FileServer(str(folder))
    for name in (STATE, ANSWERS, MODEL):
        write(str(folder / name), b"whole")
        server.write(TRIAL, 1, name, 0, [ray.put(np.zeros(3, np.uint8))])
        assert (folder / name).read_bytes() == b"whole"
    assert server.versions(str(Path(STATE).parent)).keys() == {STATE}
    assert len([*folder.rglob("*.part")]) == 3
    names = tuple(str(Path(name).parent) for name in (STATE, MODEL))
    server.take_over(TRIAL, 2, (*names, ANSWERS))
    assert not [*folder.rglob("*.part")]
    assert (folder / ANSWERS).read_bytes() == b"whole"


def test_a_full_disk_is_told_to_the_worker(folder: Path, tmp_path: Path) -> None:
    server: Any = ray.remote(FullServer).options(num_cpus=0, max_concurrency=2).remote(str(folder))
    node = Node(FileAccess(str(folder), "", server), tmp_path / "node", lease=0)
    with pytest.raises(OSError) as raised:
        node.next_report(lambda job, on_update: write_state(job, random_bytes(1)))
    assert str(folder / STATE) in str(find_full_disk(raised.value))
    assert not [*node.scratch.iterdir()]
    ray.kill(server)


def test_a_file_that_changes_while_it_is_fetched_is_fetched_again(
    folder: Path, tmp_path: Path
) -> None:
    write(str(folder / STATE), random_bytes(1))
    server: Any = ray.remote(BusyServer).options(num_cpus=0).remote(str(folder))
    node = Node(FileAccess(str(folder), "", server), tmp_path / "node", lease=0)
    found = list[bytes]()
    node.next_report(
        lambda job, on_update: found.append(
            Path(f"{job.state_dir}/{Path(STATE).name}").read_bytes()
        )
    )
    assert found == [random_bytes(2, CHUNK_BYTES + 1)]
    ray.kill(server)


def test_a_trial_gives_signs_of_life_while_its_files_are_sent(
    access: FileAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_SECONDS_BETWEEN_SIGNS", -1.0)
    told = list[ProgressUpdate]()
    node = Node(access, tmp_path / "node", lease=0, on_update=told.append)

    def train(job: Job, on_update: OnUpdate) -> None:
        on_update(update(0))
        write_state(job, random_bytes(1))

    node.next_report(train)
    assert len(told) > 2
    assert {each for each in told} == {update(0)}
    node.reports.close()


def test_a_group_that_sees_the_folder_copies_nothing(
    access: FileAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with node_files(None) as files:
        assert files is None
    with node_files(access) as files:
        assert files is None
    with node_files(replace(access, marker=f"{access.marker}-of-another-machine")) as files:
        assert files is not None


def test_what_a_killed_worker_has_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    leftover = tmp_path / "nanovlm-worker-left"
    write(str(leftover / "checkpoints" / "state"), b"left")
    write(str(leftover / ".lock"), b"")
    with transfer._scratch_folder() as first, transfer._scratch_folder() as second:
        assert {*tmp_path.iterdir()} == {first, second}, "one that is in use stays"
    assert not [*tmp_path.iterdir()]


def test_log_lines_arrive_in_order_and_nobody_waits_for_them(
    access: FileAccess, folder: Path, tmp_path: Path
) -> None:
    files, go_on = NodeFiles(access, tmp_path, fetches=True), threading.Event()

    def send(lines: str) -> None:
        assert go_on.wait(60)
        files.append_log("group-0-rank-0.log", lines)

    logger = logging.Logger("worker")
    relay = LogRelay(send)
    logger.addHandler(relay)
    for number in range(100):
        logger.info("line %d", number)
    go_on.set()
    relay.close()
    lines = (folder / "logs" / "group-0-rank-0.log").read_text().splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"line {number}" for number in range(100)]
