"""A search on a cluster that was there before, and a worker that dies in the middle of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs.conftest import SPACE, finish, ray_processes, start_program, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def cluster(no_ray_left: None) -> Iterator[str]:
    """Start a Ray cluster of two CPUs on this machine; return its address."""
    before = ray_processes()
    ray = Path(sys.executable).with_name("ray")
    start = [str(ray), "start", "--head", "--num-cpus=2"]
    subprocess.run(start, check=True, capture_output=True)
    yield "auto"
    for process in ray_processes() - before:
        process.kill()
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # `auto` would look for it there


def free_cpus(address: str) -> float:
    """Ask the cluster, from a process of its own, how many CPUs nobody holds."""
    code = (
        "import logging, ray\n"
        f"ray.init({address!r}, logging_level=logging.ERROR, log_to_driver=False)\n"
        "print('free', ray.available_resources().get('CPU', 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split("free ")[1])


def kill_a_worker() -> None:
    """Kill a worker that trains, as the system does when memory runs out."""
    (worker,) = [p for p in ray_processes() if "RayTrainWorker" in p.name() + "".join(p.cmdline())]
    os.kill(worker.pid, signal.SIGKILL)


def test_a_search_on_a_cluster_leaves_it_as_it_was(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["--space", "space.yaml", "--address", cluster, "--name", "demo"]
    arguments += ["--trials", "3", "--no-confirm", "--concurrency", "1", "data_cutoff_idx=1200"]
    log = tmp_path / "results" / "demo" / "logs" / "group-0-rank-0.log"
    process = start_program("run_search.py", *arguments, cwd=tmp_path)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("trial 0"):
            assert wait_until(lambda: "trial-0001 starts" in log.read_text(), seconds=10)
            kill_a_worker()
            break
    finished = finish(process, tmp_path / "results" / "demo", timeout=200)
    assert finished.code == 0, output + finished.output
    assert "\njoined Ray cluster, dashboard: " in output
    assert [record.number for record in finished.records] == [0, 1, 2]
    assert {record.state for record in finished.records} <= {"completed", "stopped"}
    assert log.read_text().count("trial-0001 starts") == 2, "the killed trial is started again"
    assert log.read_text().count("trial-0000 starts") == 1
    assert wait_until(lambda: free_cpus(cluster) == 2.0, seconds=30)
