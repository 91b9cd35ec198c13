"""On a cluster that was there before: a worker that dies, trials that fail, two workers a trial."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
sampler: {name: random, seed: 1}
scheduler: {rungs: 3, reduction_factor: 3}
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


def test_a_search_with_failing_trials_and_a_killed_worker_leaves_the_cluster_as_it_was(
    cluster: str, tmp_path: Path
) -> None:
    (tmp_path / f"{ODD_NAME}.yaml").write_text(SPACE)
    arguments = ["--space", f"{ODD_NAME}.yaml", "--address", cluster]
    arguments += ["--trials", "5", "--concurrency", "1"]
    log = tmp_path / "results" / ODD_NAME / "logs" / "group-0-rank-0.log"
    process = start_program("run_search.py", *arguments, cwd=tmp_path)
    assert wait_until(
        lambda: log.exists() and "trial-0000 reports at" in log.read_text(), seconds=90
    )
    kill_a_worker()
    finished = finish(process, tmp_path / "results" / ODD_NAME, timeout=200)
    assert finished.code == 0, finished.output
    assert "\njoined Ray cluster" in finished.output
    assert f"results: results/{ODD_NAME}\n" in finished.output
    logged = log.read_text()
    assert logged.count("trial-0000 starts") == 2, "the killed trial is started again"
    assert "trial-0000 goes on after" in logged
    assert logged.count("trial-0001 starts") == 1
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
