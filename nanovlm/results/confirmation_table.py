"""The table of the confirming runs that a person sees at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from nanovlm.results.terminal.texts import format_value
from nanovlm.results.verdict import DEFAULT_NUMBER, left_the_race
from nanovlm.search.sections import Objective


def confirmation_table(confirmation: Mapping[str, Any], objective: Objective) -> Table:
    """Return a row for each configuration, the best first.

    Args:
        confirmation: as in `summary.json`.
    """
    configurations = confirmation["configurations"]
    keys = sorted({key for c in configurations for key in c["parameters"]})
    table = Table(title_justify="left", header_style="bold", box=None, pad_edge=False)
    columns = ["trial", "runs", f"mean {objective.metric}", "in the search", "to the default", "p"]
    for name in (*columns, "left the race", *keys):
        table.add_column(name, justify="right", no_wrap=True)
    for c in configurations:
        difference = c["difference_to_default"] or {}
        p_value = difference.get("p_value")
        table.add_row(
            "default" if c["number"] == DEFAULT_NUMBER else str(c["number"]),
            _runs(c),
            _mean(c["mean"], c["standard_error"]),
            _number(c["search_value"]),
            escape(_difference(difference)),
            "-" if p_value is None else f"{p_value:.2g}",
            left_the_race(c, objective) or "-",
            *(escape(format_value(c["parameters"].get(key, "-"))) for key in keys),
        )
    return table


def _runs(configuration: Mapping[str, Any]) -> str:
    finished, failed = len(configuration["runs"]), len(configuration["failed"])
    return f"{finished}, {failed} failed" if failed else str(finished)


def _mean(mean: float | None, standard_error: float | None) -> str:
    return _number(mean) + ("" if standard_error is None else f" ± {standard_error:.2g}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _difference(difference: Mapping[str, Any]) -> str:
    if not difference:
        return "-"
    interval: Sequence[float] | None = difference["interval_95"] or difference["seeds_interval_95"]
    text = f"{difference['mean']:+.3g}"
    return text if interval is None else f"{text} [{interval[0]:+.3g}, {interval[1]:+.3g}]"
