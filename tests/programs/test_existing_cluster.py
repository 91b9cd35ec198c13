"""On a cluster that was there before: lost parts, trials that fail, two workers a trial."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos_checks import has_begun_a_trial, problems_in
from benchmarks.chaos_faults import Faults, Program, parts_left
from tests.processes import wait_until
from tests.programs.conftest import Finished, run_program
from tests.raylets import Node, Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1, lr_backbones: 1.0e-3, batch_size: 16}
search:
  lr_backbones: {choice: [1.0e-3, 2.0e-3, 3.0e-3, 1.0e+30]}
  lr_mp: {log_uniform: [1.0e-4, 1.0e-2]}
sampler: {name: random, seed: 0}
scheduler: {rungs: 3, reduction_factor: 3}
confirm: {top: 0}
resources: {stall_minutes: 0.25}
"""
NUM_TRIALS = 30
RUN_RECORDS = "train_v2_state_actor"
"""Ray's actor that shows the runs in the dashboard, also when they are over."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """Start a cluster of two nodes of one CPU each, beside a head that has none."""
    # The loss of a node is noticed in two seconds instead of twenty.
    with Raylets(num_cpus=0, RAY_health_check_period_ms="400") as cluster:
        cluster.add_node()
        cluster.add_node()
        yield cluster


def left_on(cluster: Raylets) -> tuple[float, list[str]]:
    """Ask the cluster, from a process of its own, how many CPUs nobody holds, and which actors have
    names: those may outlive their program."""
    code = (
        "import json, logging, ray\n"
        f"ray.init({cluster.address!r}, logging_level=logging.ERROR, log_to_driver=False)\n"
        "cpus = ray.available_resources().get('CPU', 0)\n"
        "names = [each['name'] for each in ray.util.list_named_actors(all_namespaces=True)]\n"
        "print('left', json.dumps([cpus, names]))"
    )
    environment = {**os.environ, **cluster.environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    cpus, names = json.loads(done.stdout.split("left ")[1].splitlines()[0])
    return cpus, names


def wait_for_work(faults: Faults, *nodes: Node) -> None:
    """Wait until as many nodes as are given, these ones, have a worker that has begun a trial."""

    def are_at_work() -> bool:
        assert faults.program.code() is None, "there is no work left"
        found = {n for n, process in faults.answering_workers() if has_begun_a_trial(process)}
        return found >= set(nodes)

    assert wait_until(are_at_work, seconds=240), faults.program.output.read_text()


def test_a_search_goes_on_whatever_of_it_is_lost_and_leaves_the_cluster_as_it_was(
    cluster: Raylets, tmp_path: Path
) -> None:
    """A worker hangs; then a node and a worker are lost."""
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ("--space", "space.yaml", "--trials", str(NUM_TRIALS))
    program = Program(cluster, tmp_path, "demo", *arguments)
    faults = Faults(cluster, program, random.Random(0))
    wait_for_work(faults, *faults.workers())
    assert faults.stop_worker()
    added = cluster.add_node()
    wait_for_work(faults, added)
    added.kill()
    assert faults.kill_worker()
    assert wait_until(lambda: program.code() is not None, 240), program.output.read_text()

    output = program.output.read_text()
    assert program.code() == 0, output
    assert "\njoined Ray cluster" in output
    assert "(raylet)" not in output, "what Ray prints is in driver.log"
    for said in ("no sign of life for 0.25 min", "a worker has ended"):
        assert re.search(rf"^note: group-\d+: {said}", output, re.MULTILINE), output
    assert list(problems_in(program.results, NUM_TRIALS)) == []
    check_states(Finished(0, output, program.results))
    expected = (2.0, [RUN_RECORDS])
    assert wait_until(lambda: left_on(cluster) == expected, seconds=30), left_on(cluster)
    assert parts_left(cluster) == []


def check_states(finished: Finished) -> None:
    """A trial that fails costs the others nothing."""
    states: dict[bool, set[str]] = {False: set(), True: set()}
    for record in finished.records:
        states[record.parameters["lr_backbones"] == 1e30].add(record.state)
        if record.state == "failed":
            assert "at step" in str(record.reason)
            assert record.reports == ()
    assert states[True] == {"failed"}
    assert states[False] == {"completed", "stopped"}


def test_two_workers_give_the_loss_of_one(
    search: Finished, workplace: Path, cluster: Raylets
) -> None:
    arguments = ("--config", "results/digits/best.yaml", "--workers", "2", "--address", "auto")
    double = run_program(
        "run_single.py", *arguments, cwd=workplace, name="double", **cluster.environment
    )
    assert double.code == 0, double.output
    (record,) = double.records
    best = json.loads((search.folder / "summary.json").read_text())["best"]
    for loss in ("train_loss", "val_loss"):
        assert record.metrics[loss] == pytest.approx(best["metrics"][loss], abs=1e-5)
