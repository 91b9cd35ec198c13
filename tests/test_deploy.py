"""The files for Prometheus and Grafana name what nanovlm and Ray export."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

from nanovlm.cluster.gauges import GAUGES

DEPLOY = Path(__file__).parents[1] / "deploy"
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
