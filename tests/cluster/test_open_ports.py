"""A cluster of its own, and the workers on it, are open to this machine alone."""

import functools
from pathlib import Path

import psutil
import pytest
import ray

from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import worker_groups
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import TrialResources
from nanovlm.messages import Job, TrialRecord
from tests.cluster.meeting_trials import meet, open_ports


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_nothing_listens_for_other_machines(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Two workers share a trial: they have met without an open port of torch."""
    logs = tmp_path / "logs"
    logs.mkdir()
    meeting = functools.partial(worker_groups, run_trial=meet)
    setup = ClusterSetup(TrialResources(workers=2), logs, is_own_cluster=True)
    with (
        opened_broker("ports") as broker,
        meeting(1, None, broker, setup),
    ):
        submitted = broker.submit.remote(Job(trial_id="trial-0000", config=TrainConfig()))
        ray.get(submitted)
        records: list[TrialRecord] = []
        while not (records and records[-1].end):
            records += ray.get(broker.next_events.remote())
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        names = {process.name() for process in processes}
        found = open_ports(processes)
    assert {"gcs_server", "raylet", "ray::RayTrainWorker", "ray::DashboardAgent"} <= names
    assert found == {}
    (report,) = records[-1].reports
    assert (report.metrics, report.notes) == ({"mmstar_accuracy": 3.0}, ())
