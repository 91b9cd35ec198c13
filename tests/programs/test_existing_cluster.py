"""On a cluster that was there before: lost processes, trials that fail, two workers a trial."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import output_of, start_command, wait_until
from tests.programs.conftest import (
    Finished,
    finish,
    ray_processes,
    run_program,
    start_program,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ODD_NAME = "größe 🙂 #1 'x'"

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1, lr_backbones: 1.0e-3, batch_size: 16}
search:
  lr_backbones: {choice: [1.0e-3, 1.0e+30]}
  lr_mp: {log_uniform: [1.0e-4, 1.0e-2]}
sampler: {name: random, seed: 8}  # trials 1 and 3 diverge
scheduler: {type: stopping, rungs: 3, reduction_factor: 3}
confirm: {top: 0}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Ray cluster of two CPUs on this machine; return its address."""
    before = ray_processes()
    ray = str(Path(sys.executable).with_name("ray"))
    folder = tmp_path_factory.mktemp("cluster")
    # Without the dashboard, which other tests look at.
    options = ("--num-cpus=2", "--include-dashboard=false")
    started = start_command(ray, "start", "--head", *options, cwd=folder)
    said = output_of(started)
    assert started.returncode == 0, said
    yield "auto"
    for process in ray_processes() - before:
        with contextlib.suppress(psutil.NoSuchProcess):  # with the one before it
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


def kill(title: str) -> None:
    """Kill the process of Ray with this title, as the system does when memory runs out."""
    (process,) = [p for p in ray_processes() if title in p.name() + "".join(p.cmdline())]
    os.kill(process.pid, signal.SIGKILL)


def wait_for_line(log: Path, pattern: str, seconds: float) -> None:
    assert wait_until(
        lambda: log.exists() and re.search(pattern, log.read_text()) is not None, seconds
    ), f"{log} has no line with {pattern!r}"


def test_a_search_goes_on_whatever_of_it_is_lost_and_leaves_the_cluster_as_it_was(
    cluster: str, tmp_path: Path
) -> None:
    """A worker, then Tune's actor, then a controller; some trials fail, too."""
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["--space", "space.yaml", "--address", cluster, "--name", "demo"]
    arguments += ["--trials", "5", "--concurrency", "1"]
    logs = tmp_path / "results" / "demo" / "logs"
    first, second = (logs / f"group-{number}-rank-0.log" for number in range(2))
    process = start_program("run_search.py", *arguments, cwd=tmp_path)
    wait_for_line(first, "trial-0000 reports at", seconds=90)
    kill("RayTrainWorker")
    wait_for_line(first, "trial-0000 goes on after", seconds=60)
    kill("ResourceTrainable")
    wait_for_line(first, "trial-000[1-4] reports at", seconds=60)
    kill("TrainController")
    finished = finish(process, tmp_path / "results" / "demo", timeout=200)
    assert finished.code == 0, finished.output
    assert "\njoined Ray cluster" in finished.output
    notes = [line for line in finished.output.splitlines() if line.startswith("note: ")]
    assert [line.partition(" (")[0] for line in notes] == [
        "note: group-0: a worker has ended; trial-0000 goes on from its last report in a free "
        "group",
        "note: group-0: its controller has ended",
    ]
    assert "(raylet)" not in finished.output, "what Ray prints is in driver.log"
    assert first.read_text().count("trial-0000 starts") == 2
    assert "trial-0004 starts" in second.read_text(), "another group takes the slot"
    check_states(finished)
    assert wait_until(lambda: free_cpus(cluster) == 2.0, seconds=30)


def check_states(finished: Finished) -> None:
    """A trial that fails costs the others nothing."""
    assert sorted(record.number for record in finished.records) == [0, 1, 2, 3, 4]
    by_rate: dict[float, set[str]] = {1e-3: set(), 1e30: set()}
    for record in finished.records:
        by_rate[record.parameters["lr_backbones"]].add(record.state)
        if record.state == "failed":
            assert "at step" in str(record.reason)
            assert record.reports == ()
    assert by_rate[1e30] == {"failed"}
    assert "completed" in by_rate[1e-3] <= {"completed", "stopped"}


def test_two_workers_give_the_loss_of_one(search: Finished, workplace: Path, cluster: str) -> None:
    arguments = ("--config", "results/digits/best.yaml", "--workers", "2", "--address", cluster)
    double = run_program("run_single.py", *arguments, cwd=workplace, name="double")
    assert double.code == 0, double.output
    (record,) = double.records
    best = json.loads((search.folder / "summary.json").read_text())["best"]
    for loss in ("train_loss", "val_loss"):
        assert record.metrics[loss] == pytest.approx(best["metrics"][loss], abs=1e-5)
