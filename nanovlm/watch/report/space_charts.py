"""Where in the space the good trials lie: parallel coordinates, a slice for each key, and how much
each key matters, by Optuna's PED-ANOVA over the trials of the folder."""

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import distributions

from nanovlm.config.parameter import Parameter
from nanovlm.messages import TrialRecord
from nanovlm.results.write import describe_run
from nanovlm.watch.report import style
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.style import Chart, trace

_GOLDEN = 0.6180339887498949
_JITTER = 0.32
"""Width of the strip over which the trials of one choice are spread, in steps of the axis."""

FEWEST_TRIALS = 10
"""With fewer no importance is computed."""
GOOD_TRIALS = 5
"""At least so many trials are called the good ones; the best tenth if that is more."""
ENOUGH_TRIALS = 50
"""With fewer importance is called rough."""


def _choices(parameter: Parameter) -> list[Any]:
    """Return the choices; numbers in ascending order."""
    return sorted(parameter.values) if parameter.is_ordered else [*parameter.values]


def _scale(parameter: Parameter) -> dict[str, Any]:
    """Return the scale of a key for `charts.js`; choices are at 0, 1, ..."""
    if parameter.kind == "choice":
        choices = [style.label(style.setting(choice)) for choice in _choices(parameter)]
        return {"kind": "choice", "low": 0, "high": len(choices) - 1, "choices": choices}
    low, high = parameter.values
    is_log = parameter.kind.startswith("log_")
    return {"kind": "log" if is_log else "linear", "low": low, "high": high}


def _position(record: TrialRecord, parameter: Parameter) -> float | None:
    """Return where a trial lies on the scale of a key; None where it has no such value."""
    value = record.parameters.get(parameter.key)
    if parameter.kind == "choice":
        choices = _choices(parameter)
        is_known = parameter.key in record.parameters and value in choices
        return choices.index(value) if is_known else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if parameter.kind.startswith("log_") and value <= 0 else value


def parallel_coordinates(search: SearchFolder) -> Chart:
    """Return a line for each trial over an axis for each searched key and one for the objective."""
    name, parameters = "parallel", search.parameters
    values = style.values_by_trial(search.trials, search.metric)
    if not parameters:
        return Chart(name=name, empty="No key was searched.")
    if len(values) < 2:
        return Chart(name=name, empty="Needs two trials that have reported.")
    worst, best = min(values.values()), max(values.values())
    if search.objective.mode == "min":
        worst, best = best, worst
    ticks = [worst + k / 4 * (best - worst) for k in range(5)]
    texts = [style.metric_value(tick, search.metric) for tick in ticks]
    objective = {"kind": "linear", "name": style.label(search.metric), "texts": texts}
    variant = {
        "label": "",
        "scales": [
            *(
                {"name": style.label(p.key), "isConditional": bool(p.when), **_scale(p)}
                for p in parameters
            ),
            {**objective, "low": worst, "high": best},
        ],
        "rows": [
            {
                "trial": record.trial_id,
                "isFull": record.state == "completed",
                "positions": [*(_position(record, p) for p in parameters), values[record.trial_id]],
            }
            for record in search.trials
            if record.trial_id in values
        ],
        "special": [
            {"trial": r.trial_id, "kind": kind, "name": f"{kind}, {describe_run(r)}"}
            for kind, r in search.special.items()
            if r.trial_id in values
        ],
    }
    return Chart(name=name, variants=[variant], height=460)


def slices(search: SearchFolder) -> list[Chart]:
    """Return for each searched key the objective of all trials against its value."""
    values = style.values_by_trial(search.trials, search.metric)
    return [
        Chart(
            name=f"slice-{number}",
            variants=[_slice(search, parameter, values)] if values else (),
            height=300,
            empty=f"{parameter.key}: no trial has reported yet.",
        )
        for number, parameter in enumerate(search.parameters)
    ]


def _slice(search: SearchFolder, parameter: Parameter, values: dict[str, float]) -> dict[str, Any]:
    floor, special = style.floor_of(values), search.special
    apart = {record.trial_id for record in special.values()}
    kinds = style.by_kind(r for r in search.trials if r.trial_id not in apart)
    kinds |= {kind: [record] for kind, record in special.items()}
    traces = []
    for kind, records in kinds.items():
        at = [(r, p) for r in records if (p := _position(r, parameter)) is not None]
        # A choice is moved a little so that trials do not cover others.
        width = _JITTER if parameter.kind == "choice" else 0.0
        x = [p + width * ((r.number * _GOLDEN) % 1 - 0.5) for r, p in at]
        trials = [record.trial_id for record, _ in at]
        heights = [values.get(trial, floor) for trial in trials]
        look = "point" if kind in special else "faint"
        traces += [trace(look, kind, x, heights, kind, trials)] if at else []
    return {
        "label": parameter.key,
        "traces": traces,
        "xaxis": style.axis(parameter.key, scale=_scale(parameter)),
        "yaxis": style.metric_axis(search.metric),
    }


# ---------------------------------------------------------------------- importance


def parameter_importance(search: SearchFolder) -> Chart:
    """Return the share of each searched key in what sets the good trials apart."""
    name = "importance"
    if not search.parameters:
        return Chart(name=name, empty="No key was searched.")
    milestone, values = compare_at_milestone(search)
    if not values:
        needed = f"Needs {FEWEST_TRIALS} trials that came to the same milestone"
        return Chart(name=name, empty=f"{needed}; with fewer, importance is a guess.")
    shares, remarks = importances(search, values)
    if not shares:
        return Chart(
            name=name, empty="All trials have the same value: there is nothing to compare."
        )
    texts = [f"{100 * share:.0f} %" for share in shares.values()]
    hover = "%{y}: %{x:.1%}<extra></extra>"
    keys = map(style.label, shares)
    bars = trace("shares", "completed", shares.values(), keys, text=texts, hovertemplate=hover)
    x_axis = style.axis("share", tickformat=".0%", rangemode="tozero")
    return Chart(
        name=name,
        variants=[{"label": "", "traces": [bars], "xaxis": x_axis}],
        height=90 + 44 * len(shares),
        notes=[*_importance_notes(len(values), milestone), *remarks],
    )


def compare_at_milestone(search: SearchFolder) -> tuple[int, list[tuple[TrialRecord, float]]]:
    """Return the last milestone that enough trials reached, and their values there.

    Values after different numbers of samples would show how far trials were trained. Without
    milestones (0) they are those of full trials.
    """
    for milestone in reversed(search.milestones or [0]):
        values = [
            (record, value)
            for record in search.records
            if (value := _value_at(record, milestone, search.metric)) is not None
        ]
        if len(values) >= FEWEST_TRIALS:
            return milestone, values
    return 0, []


def _value_at(record: TrialRecord, milestone: int, metric: str) -> float | None:
    """Return the metric at the first report from the milestone on; with 0, of a full trial."""
    if milestone == 0 and record.state != "completed":
        return None
    reports = record.reports if milestone else record.reports[-1:]
    reached = (r.metrics.get(metric) for r in reports if r.samples_seen >= milestone)
    return next(reached, None)


def importances(
    search: SearchFolder, values: Sequence[tuple[TrialRecord, float]]
) -> tuple[dict[str, float], list[str]]:
    """Return the share of each searched key by PED-ANOVA, the largest first, and Optuna's remarks.

    The shares add up to 1; there are none if all trials have the same value.
    """
    if len({value for _, value in values}) < 2:
        return {}, []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    is_max = search.objective.mode == "max"
    study = optuna.create_study(direction="maximize" if is_max else "minimize")
    parameters = [p for p in search.parameters if len(set(p.values)) > 1]
    for record, value in values:
        own = record.parameters
        has = [p for p in parameters if p.key in own and p.contains(own[p.key])]
        trial = optuna.trial.create_trial(
            params={p.key: own[p.key] for p in has},
            distributions={p.key: _distribution(p) for p in has},
            value=value,
        )
        study.add_trial(trial)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        quantile = _good_share(len(values))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    remarks = [f"Optuna: {w.message}" for w in warned if "experimental" not in str(w.message)]
    return shares, list(dict.fromkeys(remarks))


def _good_share(num_trials: int) -> float:
    return max(0.1, GOOD_TRIALS / num_trials)


def _distribution(parameter: Parameter) -> distributions.BaseDistribution:
    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(parameter.values)
    low, high = parameter.values
    is_int = parameter.kind in ("int", "log_int")
    kind = distributions.IntDistribution if is_int else distributions.FloatDistribution
    return kind(low, high, log=parameter.kind.startswith("log_"))  # type: ignore[arg-type]


def _importance_notes(num: int, milestone: int) -> list[str]:
    good = max(GOOD_TRIALS, round(_good_share(num) * num))
    where = "ran their full budget"
    if milestone:
        where = f"came to {style.count(milestone)} samples, by their value then"
    notes = [
        f"PED-ANOVA: how much the values of a key among the best {good} of the {num} trials that "
        f"{where}, differ from those of all of them. Shares add up to 100 %."
    ]
    if num < ENOUGH_TRIALS:
        notes.append(f"Rough: {num} trials are few; {ENOUGH_TRIALS} make it steadier.")
    return notes
