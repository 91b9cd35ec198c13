"""A search whose cluster loses its head."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos_checks import problems_in
from nanovlm.results.read import read_records
from tests.processes import output_of, start_command, wait_until
from tests.programs.conftest import REPOSITORY
from tests.raylets import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

# Patience is a minute's, less what the end takes; nobody waits that long here.
PROGRAM = """
from nanovlm import process
process.listen()
from nanovlm.cluster import worker_pool
worker_pool._HEAD_SILENCE_SECONDS, worker_pool._SECONDS_BETWEEN_PINGS = 3.0, 1.0
import run_search
from nanovlm import cli
cli.run_program(run_search.main)
"""

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 4, batch_size: 16}
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-2]}}
scheduler: {rungs: 3}
budget: {trials: 1}
confirm: {top: 0}
"""


def run(cluster: Raylets, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return start_command(
        *(sys.executable, "search.py", "--space", "space.yaml"),
        *("--address", cluster.address, "--name", "demo", *arguments),
        cwd=folder,
        PYTHONPATH=str(REPOSITORY) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        **cluster.environment,
    )


def test_the_program_ends_in_order_and_goes_on_with_another_cluster(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "search.py").write_text(PROGRAM)
    results = tmp_path / "results" / "demo"
    with Raylets(num_cpus=1, PYTHONPATH=str(REPOSITORY)) as cluster:
        program = run(cluster, tmp_path)
        assert wait_until(lambda: any(results.glob("checkpoints/*/*")), seconds=90)
        ((_, head),) = cluster.processes("gcs_server")
        head.kill()
        output = output_of(program, timeout=60)
    assert program.returncode == 1, output
    assert "Traceback" not in output
    assert "ended: the head of the Ray cluster does not answer any more" in output
    assert output.rstrip().endswith("error: the head of the Ray cluster does not answer any more")
    (command,) = [line for line in output.splitlines() if line.endswith("--name demo --resume")]
    assert "search.py --space space.yaml" in command
    assert read_records(results) == [], "the first trial had more to do"

    with Raylets(num_cpus=1, PYTHONPATH=str(REPOSITORY)) as cluster:
        program = run(cluster, tmp_path, "--resume")
        output = output_of(program, timeout=120)
    assert program.returncode == 0, output
    assert list(problems_in(results, num_trials=1)) == []
    assert "goes on after" in "".join(log.read_text() for log in results.glob("logs/group-*.log"))
