"""The report of a results folder as one HTML file that needs nothing else.

    write_report(Path("results/digits"))        # results/digits/report.html

The templates in `assets/` escape what comes from the results folder, also in the data of the
charts.
"""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from nanovlm.config.search_settings import SETTINGS
from nanovlm.config.sources import config_values, flat_values
from nanovlm.files import replace_text
from nanovlm.results.conclusion import left_the_race
from nanovlm.results.folder import PACKAGES
from nanovlm.results.pareto import choose, values_of
from nanovlm.results.read import REPORT_FILE
from nanovlm.results.statistics import interval_95
from nanovlm.results.summary import mmstar_rules
from nanovlm.results.write import describe_run
from nanovlm.watch.report import result_charts, style
from nanovlm.watch.report.folder import SearchFolder, read_search
from nanovlm.watch.report.progress_charts import best_so_far, learning_curves
from nanovlm.watch.report.space_charts import parallel_coordinates, parameter_importance, slices
from nanovlm.watch.report.worker_time import spent_time, worker_chart
from nanovlm.watch.terminal.tables import count_left_out, ranked

RELOAD_SECONDS = 15.0
"""How often the page looks for a newer report while the search runs; a large one less often."""
RELOAD_SECONDS_PER_TRIAL = 0.06

SILENT_SECONDS = 300.0
"""If a running search has written nothing for so long, the page says that it may be dead."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "assets"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
_FUNCTIONS = (
    style.metric_value, style.metric_interval, style.difference, style.difference_interval,
    style.count, style.duration, style.setting, config_values, flat_values,
    count_left_out, describe_run, shlex.quote, values_of, interval_95, mmstar_rules,
    choose, left_the_race, ranked, style.sort_key, style.spent_seconds,
)  # fmt: skip
_TEMPLATES.filters |= {function.__name__: function for function in _FUNCTIONS}


def write_report(folder: Path) -> Path:
    """Write `report.html` of a results folder, as a whole, and return where it is.

    Raises:
        UserError: there is no such folder, or it holds nothing of a search.
    """
    path = folder / REPORT_FILE
    replace_text(path, render(read_search(folder)))
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
        "charts": [{"name": c.name, "variants": c.variants} for c in charts.values()],
        "hover": style.hover_texts(search),
        "isOver": search.ended_by is not None,
        "writtenAt": int(now),
        "reloadSeconds": reload_seconds,
        "silentSeconds": SILENT_SECONDS,
    }
    return _TEMPLATES.get_template("page.html").render(
        search=search,
        charts=charts,
        states=_states(search),
        spent=spent_time(search),
        capabilities=result_charts.capabilities(search),
        SETTINGS=SETTINGS,
        PACKAGES=PACKAGES,
        written_at=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        data=rounded(data),
    )


def rounded(data: Any) -> Any:
    """Return data for JSON: fractions in six digits, all that a chart can show; None for numbers
    that JSON has no word for, which plotly leaves out."""
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [rounded(value) for value in data]
    return data


def _charts(search: SearchFolder) -> list[style.Chart]:
    if not search.is_search:
        return [learning_curves(search), result_charts.capability_chart(search)]
    tradeoff = (result_charts.front_chart, result_charts.hypervolume_chart)
    return [
        best_so_far(search),
        learning_curves(search),
        *(chart(search) for chart in tradeoff if search.is_tradeoff),
        parallel_coordinates(search),
        parameter_importance(search),
        *slices(search),
        result_charts.capability_chart(search),
        worker_chart(search),
    ]


def _states(search: SearchFolder) -> dict[str, int]:
    """Return how many trials are in each state; those that run are known by their milestones."""
    states = ("completed", "paused", "stopped", "failed")
    counts = {state: search.summary["trials"][state] for state in states}
    counts["running"] = len(search.running)
    return {state: number for state, number in counts.items() if number}
