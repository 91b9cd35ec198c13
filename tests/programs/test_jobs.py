"""The programs as jobs of a Ray cluster: submitted, followed, left, stopped, begun again."""

import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovlm.results.read import read_records
from tests.processes import output_of, start_command, wait_until
from tests.programs.conftest import finish, start_program
from tests.raylets import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SPACE = """
preset: here.yaml
base: {lr_backbones: 1.0e-3, data_cutoff_idx: 100, epochs: 1}
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-2]}}
scheduler: {name: none}
budget: {trials: 500}
confirm: {top: 0}
"""
PRESET = Path(__file__).parents[2] / "nanovlm/config/presets/digits.yaml"
PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Raylets, str]]:
    """Return a cluster with a token, and the address of its dashboard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--include-dashboard=true", f"--dashboard-port={port}")
    path = {"PATH": f"{PYTHON.parent}:/usr/bin:/bin"}  # a job's `python` is the head's
    with Raylets(2, *options, **path) as cluster:
        yield cluster, f"http://127.0.0.1:{port}"


def test_a_job_is_left_stopped_and_goes_on(cluster: tuple[Raylets, str], tmp_path: Path) -> None:
    raylets, address = cluster
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "here.yaml").write_text(PRESET.read_text())
    results = tmp_path / "results"
    arguments = ["--space", "space.yaml", "--results", str(results), "--concurrency", "1"]
    arguments += ["--submit", address]
    # What RAY_ADDRESS says is not what the user asks for here.
    environment = {**raylets.environment, "RAY_ADDRESS": "http://127.0.0.1:1"}
    first = start_program("run_search.py", *arguments, cwd=tmp_path, **environment)
    trials = results / "space" / "trials.jsonl"
    wait_until(lambda: trials.exists() or first.poll() is not None, seconds=120)
    first.send_signal(signal.SIGINT)
    said = output_of(first)
    assert trials.exists(), said
    assert first.returncode == 130, said
    assert "joined Ray cluster" in said and "Traceback" not in said
    look, end = re.findall(r"ray (job logs --follow .+|job stop .+)", said)[:2]
    assert said.rstrip().endswith(f"ray {look}")

    ray = str(PYTHON.with_name("ray"))
    following = start_command(ray, *look.split(), cwd=tmp_path, **raylets.environment)
    stopping = start_command(ray, *end.split(), cwd=tmp_path, **raylets.environment)
    assert "was stopped" in output_of(stopping)
    assert "interrupted; to go on:" in output_of(following)
    num_before = len(read_records(trials.parent))

    arguments += ["--trials", str(num_before + 1)]
    again = start_program("run_search.py", *arguments, cwd=tmp_path, **environment)
    finished = finish(again, trials.parent)
    assert finished.code == 0, finished.output
    assert "succeeded" in finished.output
    assert [record.number for record in finished.records] == list(range(num_before + 1))
    assert [path.name for path in results.iterdir()] == ["space"]
