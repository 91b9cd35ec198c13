"""The files in deploy/: what they name is there, and what they run can be run."""

import json
import re
import shlex
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

import run_search
from nanovlm.cluster.gauges import GAUGES
from nanovlm.cluster.jobs import STOP_SECONDS

DEPLOY = Path(__file__).parents[1] / "deploy"
LOCK = DEPLOY.parent / "requirements.lock"
DASHBOARD = json.loads((DEPLOY / "grafana/nanovlm.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def names(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\bray_\w+", text)}


def test_every_metric_is_one_that_is_exported() -> None:
    rays_own = Path(str(default_dashboard_panels.__file__)).read_text(encoding="utf-8")
    known = {f"ray_{name}" for name in GAUGES} | names([rays_own])
    used = names(EXPRESSIONS)
    assert used <= known
    assert {f"ray_{name}" for name in GAUGES} <= used, "a gauge that no panel shows"


def test_every_tag_is_one_that_the_gauge_has() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            (*ours,) = (n.removeprefix("ray_") for n in names([target["expr"]]) if "nanovlm" in n)
            for gauge in ours:
                assert 'search=~"$search"' in target["expr"]
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= {*GAUGES[gauge][1]}


def test_the_variables_are_there() -> None:
    source, search = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert (search["name"], search["type"]) == ("search", "query")
    assert names([search["definition"]]) <= {f"ray_{name}" for name in GAUGES}
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    asked: list[Any] = [*PANELS, *(t for panel in PANELS for t in panel["targets"]), search]
    assert all(part["datasource"] == wanted for part in asked)


def test_the_panels_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in PANELS)


def test_prometheus_reads_rays_list_of_endpoints() -> None:
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = content["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


KUBERNETES = {path.stem: path for path in (DEPLOY / "kubernetes").glob("*.yaml")}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "headGroupSpec": {"rayStartParams": dict, "template": dict},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": dict,
        }
    ],
}
RAY_JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "rayClusterSpec": RAY_CLUSTER,
}
"""The fields that the files use, by the types of KubeRay 1.5 (ray-operator/apis/ray/v1)."""


def has_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        return value.keys() <= kind.keys() and all(has_kind(value[key], kind[key]) for key in value)
    if isinstance(kind, list):
        return all(has_kind(each, kind[0]) for each in value)
    return type(value) is kind


def resources_of(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES[name].read_text(encoding="utf-8")))


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_clusters_are_such_as_kuberay_takes() -> None:
    (cluster,), (job,) = resources_of("cluster"), resources_of("job")
    for each, kind, fields in (
        (cluster, "RayCluster", RAY_CLUSTER),
        (job, "RayJob", RAY_JOB),
    ):
        assert (each["apiVersion"], each["kind"]) == ("ray.io/v1", kind)
        assert has_kind(each["spec"], fields)
    ours = job["spec"]["rayClusterSpec"]
    assert ours["workerGroupSpecs"] == cluster["spec"]["workerGroupSpecs"]
    versions = dict(
        line.split("==") for line in LOCK.read_text().splitlines() if re.match(r"\w.*==", line)
    )
    for spec in (cluster["spec"], ours):
        assert spec["rayVersion"] == versions["ray"]
        assert all(isinstance(v, str) for v in spec["headGroupSpec"]["rayStartParams"].values())
        for pod in pods_of(spec):
            named = {volume["name"] for volume in pod["volumes"]}
            mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounted == named


def test_what_the_resources_name_is_there() -> None:
    (claim,) = resources_of("storage")
    service, database = resources_of("postgres")
    for name in ("cluster", "job"):
        text = KUBERNETES[name].read_text(encoding="utf-8")
        assert {*re.findall(r"claimName: ([\w-]+)", text)} == {claim["metadata"]["name"]}
        assert {*re.findall(r"secretKeyRef: {name: ([\w-]+)", text)} == {"nanovlm-db"}
    assert service["spec"]["selector"] == database["spec"]["template"]["metadata"]["labels"]
    head = KUBERNETES["postgres"].read_text(encoding="utf-8")
    assert f"@{service['metadata']['name']}/nanovlm" in head, "the line for the space file"


def test_the_job_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = resources_of("job")
    python, m, program, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, m, program) == ("python", "-m", "run_search")
    monkeypatch.setattr("sys.argv", ["run_search.py", *words])
    arguments = run_search.parse_arguments()
    assert arguments.resume_if_exists and arguments.results.is_absolute()
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}


def test_the_image_has_what_the_wheel_is_made_of() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert all((DEPLOY.parent / name).exists() for name in copied)
    made_of = {"pyproject.toml", "README.md", "LICENSE", "nanovlm", "search_spaces"}
    assert copied == {*made_of, "requirements.lock", "run_search.py", "run_single.py"}


PROGRAMS = {
    "scontrol": """
        if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >> requeued; fi""",
    "srun": 'exec "$@"',
    "squeue": 'echo "$END"',
    # Notes what it is asked for, and runs the command as on the first node.
    "ray": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> started; shift 6; exec "$@"',
    "python": f"""
        if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
        echo "$@" >> searched; sleep "${{SECONDS_OF_SEARCH:-0}}"; exit "${{CODE:-0}}" """,
}


@pytest.mark.parametrize(
    ("seconds_left", "environment", "code", "requeued"),
    [
        (1000, {}, 0, False),
        (1000, {"CODE": "2"}, 2, False),
        (302, {"SECONDS_OF_SEARCH": "30"}, 124, True),  # the search is ended five minutes before
    ],
)
def test_the_script_for_slurm(
    tmp_path: Path, seconds_left: int, environment: dict[str, str], code: int, requeued: bool
) -> None:
    for name, text in PROGRAMS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text.strip()}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "END": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds_left)),
    }
    done = subprocess.run(
        ["bash", str(DEPLOY / "slurm.sh"), "--space", "a b.yaml"],
        cwd=tmp_path,
        env={**slurm, **environment, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    started = (tmp_path / "started").read_text()
    command = "symmetric-run --address node-a:6379 --min-nodes 2 -- timeout"
    assert started.startswith(f"token 64 {command}")
    searched = "-m run_search --address node-a:6379 --resume-if-exists --space a b.yaml\n"
    assert (tmp_path / "searched").read_text() == searched
    assert (tmp_path / "requeued").exists() == requeued
