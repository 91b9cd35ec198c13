"""The tables of the report, as rows of text with what they are sorted by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.config.search_settings import SETTINGS, Objective
from nanovlm.config.sources import config_values, flat_values
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER, left_the_race
from nanovlm.results.folder import PACKAGES
from nanovlm.results.statistics import interval_95
from nanovlm.watch.report.capability_chart import parts, sides
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import (
    NOTHING,
    count,
    difference,
    difference_interval,
    duration,
    metric_interval,
    metric_value,
    setting,
    spent_seconds,
)
from nanovlm.watch.terminal.tables import count_left_out


@dataclass(frozen=True)
class Cell:
    """A cell: what it shows and, if that is a number, the number it is sorted by."""

    text: str
    value: float | None = None
    kind: str = "text"
    """`number`, `text`, `long` (many words), or `state`."""

    @property
    def sort_key(self) -> str:
        """What the page's script sorts by; the empty text comes last."""
        if self.kind != "number":
            return "" if self.text == NOTHING else self.text
        return "" if self.value is None else f"{self.value:.12g}"


@dataclass(frozen=True)
class Table:
    """A table with a title for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[bool]
    """Of each column: whether it holds numbers."""


def number_cell(value: float | None, text: str | None = None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(NOTHING, None, "number")
    return Cell(f"{value:g}" if text is None else text, value, "number")


def trials_table(search: SearchFolder) -> Table:
    """Return all trials, the best first; a shorter trial never before a full one."""
    keys = [parameter.key for parameter in search.parameters]
    stop_reasons = {v["number"]: v.get("reason", "") for v in search.verdicts if not v["goes_on"]}
    columns = ["rank", "trial", "state", search.metric, "95 % interval", "samples", "time"]
    columns += ["samples/s", *keys, "reason"]
    rows = [
        _trial_row(place, record, search.metric, keys, stop_reasons)
        for place, record in enumerate(ranked(search), 1)
    ]
    return make_table(columns, rows)


def _trial_row(
    place: int,
    record: TrialRecord,
    metric: str,
    keys: Sequence[str],
    stop_reasons: Mapping[int, str],
) -> list[Cell]:
    value = record.metrics.get(metric)
    interval = interval_95(record.metrics, metric)
    speed = record.reports[-1].speed if record.reports else None
    rate = None if speed is None else speed.samples_per_second
    reason = record.reason or (
        stop_reasons.get(record.number, "") if record.state in ("paused", "stopped") else ""
    )
    notes = dict.fromkeys(note for report in record.reports for note in report.notes)
    return [
        number_cell(place),
        number_cell(record.number),
        Cell(record.state, None, "state"),
        number_cell(value, metric_value(value, metric)),
        number_cell(interval and interval[0], metric_interval(interval, metric)),
        number_cell(record.samples_seen, count(record.samples_seen)),
        number_cell(spent_seconds(record), duration(spent_seconds(record))),
        number_cell(rate, None if rate is None else f"{rate:.0f}"),
        *(value_cell(record.parameters, key) for key in keys),
        Cell("; ".join(filter(None, (reason, *notes))) or NOTHING, None, "long"),
    ]


def value_cell(parameters: Mapping[str, Any], key: str) -> Cell:
    """Return the cell of a searched key."""
    if key not in parameters:
        return Cell(NOTHING)
    value = parameters[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_cell(float(value), setting(value))
    return Cell(setting(value))


def ranked(search: SearchFolder) -> list[TrialRecord]:
    """Return the trials in the order of their table."""
    sign = -1 if search.objective.mode == "max" else 1
    order = {"completed": 0, "paused": 1, "stopped": 2, "failed": 3}

    def rank(record: TrialRecord) -> tuple[int, int, float]:
        value = record.metrics.get(search.metric, math.inf)
        length = 0 if record.state == "completed" else record.samples_seen
        return order[record.state], -length, sign * value

    return sorted(search.trials, key=rank)


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Return a table; a column with numbers is one of numbers."""
    numeric = [any(row[i].kind == "number" for row in rows) for i in range(len(columns))]
    return Table(columns, rows, numeric)


def confirmation_rows(search: SearchFolder) -> Table | None:
    """Return a row for each configuration that was run again, the best first."""
    if search.confirmation is None:
        return None
    metric = search.metric
    configurations = search.confirmation["configurations"]
    keys = sorted({key for c in configurations for key in c["parameters"]})
    columns = ["configuration", f"mean {metric}", "± standard error", "each seed", "in the search"]
    columns += ["to the default", "95 %, other questions", "95 %, other seeds", "p"]
    columns += ["left the race", *keys]
    rows = [_confirmation_row(c, search.objective, keys) for c in configurations]
    if any(c["failed"] for c in configurations):
        columns += ["failed runs"]
        for row, c in zip(rows, configurations, strict=True):
            failed = "; ".join(f"seed {run['seed']}: {run['reason']}" for run in c["failed"])
            row.append(Cell(failed or NOTHING, None, "long"))
    return make_table(columns, rows)


def _confirmation_row(
    c: Mapping[str, Any], objective: Objective, keys: Sequence[str]
) -> list[Cell]:
    metric, gap = objective.metric, c["difference_to_default"] or {}
    p_value, error = gap.get("p_value"), c["standard_error"]
    runs = ", ".join(f"{metric_value(r['value'], metric)} (seed {r['seed']})" for r in c["runs"])
    name = "default" if c["number"] == DEFAULT_NUMBER else f"trial {c['number']}"
    return [
        Cell(name),
        number_cell(c["mean"], metric_value(c["mean"], metric)),
        number_cell(error, None if error is None else metric_value(error, metric)),
        Cell(runs or NOTHING),
        number_cell(c["search_value"], metric_value(c["search_value"], metric)),
        number_cell(gap.get("mean"), difference(gap.get("mean"), metric)),
        Cell(difference_interval(gap.get("interval_95"), metric) or NOTHING),
        Cell(difference_interval(gap.get("seeds_interval_95"), metric) or NOTHING),
        number_cell(p_value, None if p_value is None else f"{p_value:.2g}"),
        Cell(left_the_race(c, objective) or NOTHING),
        *(value_cell(c["parameters"], key) for key in keys),
    ]


def axes_table(search: SearchFolder) -> Table | None:
    """Return the accuracies of all capabilities and their axes, best and default."""
    rows = parts(search, sides(search))
    if not rows:
        return None
    columns = ["capability", "axis", "questions", "default", "best", "difference"]
    metric = "accuracy"
    cells = []
    for row in rows:
        capability, _, axis = row.name.partition("/")
        both = row.best is not None and row.default is not None
        gap = row.best - row.default if both else None  # type: ignore[operator]
        cells.append(
            [
                Cell(capability),
                Cell(axis or "all"),
                number_cell(row.num_items, count(row.num_items or 0)),
                number_cell(row.default, metric_value(row.default, metric)),
                number_cell(row.best, metric_value(row.best, metric)),
                number_cell(gap, difference(gap, metric)),
            ]
        )
    return make_table(columns, cells)


def space_table(search: SearchFolder) -> Table:
    """Return the searched keys with their ranges."""
    default = search.space.default_values() if search.space else {}
    rows = [
        [
            Cell(parameter.key),
            Cell(parameter.kind),
            Cell(_range(parameter.kind, parameter.values)),
            Cell(setting(default[parameter.key]) if parameter.key in default else NOTHING),
            Cell(_condition(parameter.when) or NOTHING),
        ]
        for parameter in search.parameters
    ]
    return make_table(["key", "kind", "values", "default", "only if"], rows)


def _range(kind: str, values: Sequence[Any]) -> str:
    return ("; " if kind == "choice" else " to ").join(map(setting, values))


def _condition(when: Mapping[str, Sequence[Any]]) -> str:
    return " and ".join(
        f"{key} is {' or '.join(map(setting, values))}" for key, values in when.items()
    )


Facts = Sequence[tuple[str, str]]
"""Names and what they are, one below the other."""


def settings_facts(search: SearchFolder) -> Facts:
    """Return how the search was set up, besides the searched keys."""
    if search.space is None:
        return []
    return [
        (section, _plain(getattr(search.space, section)))
        for section in SETTINGS
        if getattr(search.space, section) not in (None, ())
    ]


def _plain(section: Any) -> str:
    if isinstance(section, tuple):
        return ", ".join(section)
    if isinstance(section, Objective) and len(section.all) > 1:
        return "; ".join(map(_plain, section.all))
    given = {key: value for key, value in section.model_dump().items() if value is not None}
    return ", ".join(f"{key} {setting(value)}" for key, value in given.items()) or "a file"


def base_facts(search: SearchFolder) -> Facts:
    """Return the configuration that everything starts from, or of a single run its own."""
    if search.space is not None:
        config: Mapping[str, Any] = config_values(search.space.base)
    else:
        config = search.records[0].config if search.records else {}
    searched = {parameter.key for parameter in search.parameters}
    return [
        (key, setting(value)) for key, value in flat_values(config).items() if key not in searched
    ]


def environment_facts(search: SearchFolder) -> Facts:
    """Return what the search ran on."""
    found = search.environment
    if not found:
        return []
    packages = found.get("packages", {})
    commit = found.get("git_commit")
    changed = ", with changes that were not committed" if found.get("git_is_dirty") else ""
    gpus = found.get("gpus") or []
    facts = [
        ("GPU", ", ".join(map(str, gpus)) or "none"),
        ("CPUs", str(found.get("cpus", NOTHING))),
        ("platform", str(found.get("platform", NOTHING))),
        ("python", str(found.get("python", NOTHING))),
        *((name, str(packages.get(name) or "not installed")) for name in PACKAGES),
        ("commit", f"{commit}{changed}" if commit else "not run from a checkout"),
    ]
    command = found.get("command")
    return [*facts, ("command", " ".join(map(str, command)))] if command else facts


def data_facts(search: SearchFolder) -> Facts:
    """Return what the data came to."""
    if not search.data:
        return []
    training, benchmark = search.data["training"], search.data["benchmark"]
    left_out = count_left_out(training)
    said = ", ".join(f"{count(number)} {what}" for what, number in left_out.items())
    return [
        ("training", f"{count(training['samples'])} samples of {count(training['rows'])} rows"),
        ("sub-sets", ", ".join(training.get("subsets", {})) or NOTHING),
        ("left out", said or "nothing"),
        ("benchmark", f"{count(benchmark['samples'])} questions"),
    ]
