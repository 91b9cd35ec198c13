"""What Ray shows of a run: gauges on its Prometheus endpoint, names in its dashboard."""

import contextlib
import functools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.broker_client import BrokerClient
from nanovlm.cluster.gauges import GAUGES, Gauges
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.relay import run_to_end
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import worker_groups
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import TrialResources
from nanovlm.files import identifier
from nanovlm.messages import Job
from tests.browser import chromium
from tests.search.fake_trials import pretend
from tests.watch.example_run import COMPLETED, FAILED, STOPPED, record, start, update

_SAMPLE = re.compile(r"^(ray_nanovlm_\w+){(.*)} (\S+)$", re.MULTILINE)

Values = dict[tuple[str, ...], float]


def gauge_values(run: str) -> Values:
    """Return the values of a run's gauges on the endpoint by name and by the values of their tags.

    There may be those of another run in this process that has ended without saying so.
    """
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in _SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        keys = GAUGES[name.removeprefix("ray_")][1]
        if tags["search"] == run:
            found[(name, *(tags[key] for key in keys))] = float(value)
    return found


def wait_for(run: str, expected: Values) -> None:
    deadline = time.monotonic() + 40
    while (found := gauge_values(run)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == expected


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_the_gauges_are_on_rays_endpoint(ray_cluster: Cluster, tmp_path: Path) -> None:
    observer, name = Gauges(refresh_seconds=0.2), identifier("größe 1")
    observer.begin(start(tmp_path / "größe 1", records=(FAILED,)))
    observer.trial_changed(record(0, 0, "running"))
    observer.trial_changed(COMPLETED)
    observer.trial_changed(record(1, 0, "running"))
    observer.progress(update(1, 50))
    observer.trial_changed(record(1, 1, "running"))
    observer.trial_changed(record(3, 1, "running"))
    observer.progress(update(3, 150))
    observer.trial_changed(record(4, 1, "running"))
    observer.trial_changed(record(4, 1, "paused"))  # its count stays alone
    counts = {
        ("ray_nanovlm_best_accuracy", name): 0.9,
        ("ray_nanovlm_trials", name, "completed"): 1.0,
        ("ray_nanovlm_trials", name, "failed"): 1.0,
        ("ray_nanovlm_trials", name, "stopped"): 0.0,
        ("ray_nanovlm_trials", name, "running"): 2.0,
        ("ray_nanovlm_trials", name, "paused"): 1.0,
    }
    third = {
        ("ray_nanovlm_trial_accuracy", name, "trial-0003"): 0.13,
        ("ray_nanovlm_samples_per_second", name, "trial-0003"): 63.0,
        ("ray_nanovlm_data_wait_fraction", name, "trial-0003"): 0.125,
    }
    first = {
        ("ray_nanovlm_trial_accuracy", name, "trial-0001"): 0.11,
        ("ray_nanovlm_samples_per_second", name, "trial-0001"): 51.0,
        ("ray_nanovlm_data_wait_fraction", name, "trial-0001"): 0.25,
    }
    wait_for(name, counts | first | third)

    observer.trial_changed(STOPPED)  # its values go, the counts stay
    counts[("ray_nanovlm_trials", name, "stopped")] = 1.0
    counts[("ray_nanovlm_trials", name, "running")] = 1.0
    wait_for(name, counts | third)
    observer.end({})
    wait_for(name, {})
    assert observer.problem is None


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_the_dashboard_shows_the_run_under_its_name(ray_cluster: Cluster, tmp_path: Path) -> None:
    name = identifier("größe")  # Ray's names are ASCII
    logs = tmp_path / "größe" / "logs"
    logs.mkdir(parents=True)
    pretending = functools.partial(worker_groups, run_trial=pretend)
    with (
        opened_broker("größe") as broker,
        pretending(1, 1, broker, ClusterSetup(TrialResources(), logs, is_own_cluster=False)),
    ):
        client = BrokerClient(broker)
        threading.Thread(target=take_in_all_events, args=(broker, client), daemon=True).start()
        run_to_end(client, lambda: [Job(trial_id="trial-0000", config=TrainConfig())], lambda: 1)
        with chromium() as browser:
            page = browser.new_page()
            sign_in(page, str(ray_cluster.dashboard_url))
            page.goto(f"{ray_cluster.dashboard_url}/#/actors")
            page.get_by_text(f"{name}-group-0", exact=True).wait_for(timeout=60_000)
            assert "RayTrainWorker" in row_with(page, f"{name}-group-0")
            assert "Broker" in row_with(page, f"nanovlm-broker-{name}")
            page.goto(f"{ray_cluster.dashboard_url}/api/train/v2/runs/v1")
            runs = json.loads(page.inner_text("body"))["train_runs"]
    (run,) = [run for run in runs if run["name"] == f"{name}-group-0"]
    assert run["status"] == "RUNNING"
    (attempt,) = run["attempts"]
    (worker,) = attempt["workers"]
    assert (worker["world_rank"], worker["status"]) == (0, "ALIVE")


def take_in_all_events(broker: Any, client: BrokerClient) -> None:
    """Do what the driver does, so that whoever waits for a report hears of it."""
    with contextlib.suppress(ray.exceptions.RayActorError):  # the end of the broker
        while events := ray.get(broker.next_events.remote()):
            client.take(events)


def sign_in(page: Any, url: str) -> None:
    """Type the token into the dialog that the dashboard opens with, as a user does."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "get-auth-token"]
    token = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    page.goto(url)
    page.get_by_text("Authentication Token Required").wait_for(timeout=60_000)
    page.get_by_role("textbox", name="Authentication Token").fill(token)
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("Authentication Token Required").wait_for(state="hidden", timeout=60_000)


def row_with(page: Any, text: str) -> list[str]:
    """Return the cells of the row of the dashboard's table that has a cell with this text."""
    rows = [row.locator("td").all_inner_texts() for row in page.locator("tbody tr").all()]
    (row,) = [row for row in rows if text in row]
    return list(row)


def test_without_ray_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's may be there
    observer = Gauges(refresh_seconds=0.01)
    observer.begin(start(tmp_path / "demo"))
    observer.trial_changed(COMPLETED)
    time.sleep(0.05)
    observer.end({})
    assert observer.problem is None
