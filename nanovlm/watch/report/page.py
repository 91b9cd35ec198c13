"""The report of a results folder as one HTML file that needs nothing else.

    write_report(Path("results/digits"))        # results/digits/report.html

The template, the style sheet and the script lie in `assets/`; what comes from the results folder is
escaped by the template, and in the data of the charts by `embedded_json`.
"""

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from nanovlm.files import replace_text
from nanovlm.results.read import REPORT_FILE
from nanovlm.watch.report import headline, tables
from nanovlm.watch.report.capability_chart import capability_chart
from nanovlm.watch.report.figure import STATE_STYLES, Chart, hover_texts
from nanovlm.watch.report.folder import SearchFolder, read_search
from nanovlm.watch.report.importance import parameter_importance
from nanovlm.watch.report.pareto_charts import (
    front_chart,
    front_table,
    hypervolume_chart,
)
from nanovlm.watch.report.progress_charts import best_so_far, learning_curves
from nanovlm.watch.report.space_charts import parallel_coordinates, slices
from nanovlm.watch.report.wording import duration, share
from nanovlm.watch.report.worker_time import Spent, spent_time, worker_chart

RELOAD_SECONDS = 15.0
"""How often the page looks for a newer report while the search runs; a large one less often."""
RELOAD_SECONDS_PER_TRIAL = 0.06

SILENT_SECONDS = 300.0
"""If a running search has written nothing for so long, the page says that it may be dead."""

_ASSETS = Path(__file__).parent / "assets"


def write_report(folder: Path) -> Path:
    """Write `report.html` of a results folder, as a whole, and return where it is.

    Raises:
        UserError: there is no such folder, or it holds nothing of a search.
    """
    text = render(read_search(folder))
    path = folder / REPORT_FILE
    replace_text(path, text)
    return path


def render(search: SearchFolder, reload_seconds: float | None = None) -> str:
    """Return the page.

    Args:
        reload_seconds: how often it looks for a newer one while the search runs; None decides by
            the number of trials.
    """
    if reload_seconds is None:
        reload_seconds = max(RELOAD_SECONDS, RELOAD_SECONDS_PER_TRIAL * len(search.records))
    charts = {chart.name: chart for chart in _charts(search)}
    now = time.time()
    data = {
        "charts": [chart.as_data() for chart in charts.values()],
        "hover": hover_texts(search),
        "isOver": search.ended_by is not None,
        "writtenAt": now,
        "reloadSeconds": reload_seconds,
        "silentSeconds": SILENT_SECONDS,
    }
    spent = spent_time(search)
    return _environment().get_template("page.html").render(
        search=search,
        charts=charts,
        slices=[chart for name, chart in charts.items() if name.startswith("slice-")],
        states=_states(search),
        head=headline,
        tables=tables,
        front_table=front_table,
        spent=spent_parts(spent),
        lost=lost_time(spent),
        symbols=STATE_STYLES,
        written_at=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        style=Markup(_asset("style.css")),
        script=Markup(_asset("script.js")),
        plotly=Markup(_plotly()),
        data=embedded_json(data),
    )  # fmt: skip


def embedded_json(data: Any) -> Markup:
    """Return JSON that can stand in a <script> element, whatever its texts hold.

    Numbers that JSON has no word for become null, which plotly leaves out.
    """
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_finite(value) for value in data]
    return data


def _charts(search: SearchFolder) -> list[Chart]:
    if not search.is_search:
        return [learning_curves(search), capability_chart(search)]
    return [
        best_so_far(search),
        learning_curves(search),
        *([front_chart(search), hypervolume_chart(search)] if search.is_tradeoff else []),
        parallel_coordinates(search),
        parameter_importance(search),
        *slices(search),
        capability_chart(search),
        worker_chart(search),
    ]


def _states(search: SearchFolder) -> dict[str, int]:
    """Return how many trials are in each state; those that run are known by their milestones."""
    counts = {
        state: search.summary["trials"][state]
        for state in ("completed", "paused", "stopped", "failed")
    }
    if search.ended_by is None:
        known = {record.number for record in search.trials}
        counts["running"] = len({v["number"] for v in search.verdicts} - known)
    return {state: number for state, number in counts.items() if number}


def spent_parts(spent: Sequence[Spent]) -> list[dict[str, Any]]:
    """Return what the workers' time went into, with its share of the whole."""
    whole = sum(part.seconds for part in spent)
    return [
        {
            "kind": part.kind,
            "name": part.name,
            "time": duration(part.seconds),
            "share": share(part.seconds, whole),
            "width": round(100 * part.seconds / whole, 3) if whole else 0,
        }
        for part in spent
        if part.seconds > 0
    ]


def lost_time(spent: Sequence[Spent]) -> dict[str, str]:
    """Return the time that went neither into full trials nor into runs that confirm."""
    whole = sum(part.seconds for part in spent)
    lost = whole - sum(p.seconds for p in spent if p.kind in ("completed", "confirming"))
    return {"time": duration(lost), "share": share(lost, whole)}


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    text: str = plotly.offline.get_plotlyjs()
    return text
