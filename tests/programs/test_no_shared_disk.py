"""A search on nodes that do not see the results folder, with mount namespaces of their own."""

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanovlm.config.space import load_space
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.results.read import answers_file
from nanovlm.search.plan import plan_search
from nanovlm.trial import run_trial
from tests.processes import wait_until
from tests.programs.conftest import Finished, finish, start_program
from tests.raylets import Node, Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1, lr_backbones: 1.0e-3, batch_size: 16}
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-2]}}
sampler: {name: random, seed: 8}
scheduler: {type: stopping, rungs: 3, reduction_factor: 3}
confirm: {top: 0}
"""


def add_node(cluster: Raylets, place: Path, cache: Path) -> Node:
    """Add a node of which another disk is at `place`, and which prepares its data in `cache`."""
    mount = 'mount -t tmpfs none "$0" && exec "$@"'
    user = () if os.getuid() == 0 else ("--map-root-user",)
    prefix = ("env", f"HF_ASSETS_CACHE={cache}", "unshare", "--mount", *user, "sh", "-c", mount)
    return cluster.add_node(1, prefix=(*prefix, str(place)))


def test_a_search_on_nodes_without_a_shared_disk(tmp_path: Path) -> None:
    """The driver and the node are lost: on another node the trial goes on from its last report."""
    place, caches = tmp_path / "place", (tmp_path / "first", tmp_path / "second")
    place.mkdir()
    (place / "space.yaml").write_text(SPACE)
    log = place / "results" / "demo" / "logs" / "group-0-rank-0.log"
    with Raylets(num_cpus=0) as cluster:
        node = add_node(cluster, place, caches[0])
        command = ["run_search.py", "--space", "space.yaml", "--address", cluster.address]
        command += ["--trials", "2", "--name", "demo"]
        search = start_program(*command, cwd=place, **cluster.environment)
        reported = "trial-0000 reports at 240"
        assert wait_until(lambda: log.exists() and reported in log.read_text(), seconds=120)
        search.send_signal(signal.SIGKILL)
        node.kill()
        search.wait()
        add_node(cluster, place, caches[1])
        search = start_program(*command, "--resume", cwd=place, **cluster.environment)
        finished = finish(search, place / "results" / "demo")
    assert finished.code == 0, finished.output
    assert "trial-0000 goes on after 240 samples" in log.read_text()
    for cache in caches:
        assert any(cache.rglob("images.bin")), "each node has prepared the data for itself"
    check_same_as_on_one_machine(finished, place / "space.yaml", tmp_path)


def check_same_as_on_one_machine(finished: Finished, space_file: Path, tmp_path: Path) -> None:
    """Run the same trials here: their reports, answers and models are the same to the bit."""
    plan, resources = plan_search(load_space(space_file)), Resources("cpu")
    folder = finished.folder
    best = json.loads((folder / "summary.json").read_text())["best"]["trial_id"]
    assert len(finished.records) == 2
    for record in finished.records:
        output, answers = tmp_path / record.trial_id, tmp_path / f"{record.trial_id}.jsonl"
        job = Job(
            trial_id=record.trial_id,
            config=plan.space.config_for(record.parameters),
            milestones=plan.milestones,
            output_dir=str(output),
            answers_file=str(answers),
        )
        trial = run_trial(job, resources)
        reports = [report for _, report in zip(record.reports, trial, strict=False)]
        trial.close()
        assert [report.metrics for report in reports] == [r.metrics for r in record.reports]
        assert answers_file(folder, record.trial_id).read_bytes() == answers.read_bytes()
        if record.trial_id == best:
            names = ("config.json", "model.safetensors")
            there, here = ([path / name for name in names] for path in (folder / "best", output))
            assert there[0].read_bytes() == here[0].read_bytes()
            models = load_file(there[1]), load_file(here[1])
            assert models[0].keys() == models[1].keys()
            assert all(models[0][name].equal(tensor) for name, tensor in models[1].items())
    leftovers = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".state"))]
    assert not leftovers
