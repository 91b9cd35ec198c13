"""How much each searched key matters, by Optuna's PED-ANOVA over the trials of the folder."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nanovlm.config.parameter import Parameter
from nanovlm.messages import TrialRecord
from nanovlm.watch.report.figure import Chart, Variant, compact, label, value_of
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import count

FEWEST_TRIALS = 10
"""With fewer nothing is computed."""
GOOD_TRIALS = 5
"""So many trials, at least, are called the good ones; the best tenth if that is more."""
ENOUGH_TRIALS = 50
"""With fewer the result is called rough."""


@dataclass(frozen=True)
class Compared:
    """Trials whose values can be compared: those that came to the same number of samples."""

    milestone: int
    values: Sequence[tuple[TrialRecord, float]]
    """Of each trial the objective there."""


def parameter_importance(search: SearchFolder) -> Chart:
    """Return the share of each searched key in what sets the good trials apart."""
    if not search.parameters:
        return Chart(name="importance", empty="No key was searched.")
    compared = compare_at_milestone(search)
    if compared is None:
        return Chart(
            name="importance",
            empty=f"Needs {FEWEST_TRIALS} trials that came to the same milestone; with fewer, "
            "importance is a guess.",
        )
    shares, remarks = importances(search.parameters, compared, search.objective.mode)
    if not shares:
        return Chart(name="importance", empty="All trials are alike: nothing can be told apart.")
    return Chart(
        name="importance",
        variants=[Variant(label="", traces=[_bars(shares)], layout=_LAYOUT)],
        height=90 + 44 * len(shares),
        notes=[*_notes(compared), *remarks],
    )


def compare_at_milestone(search: SearchFolder) -> Compared | None:
    """Return the trials at the last milestone that enough of them reached; None without one.

    Values after different numbers of samples would show how far trials were trained.
    """
    milestones = search.milestones or [0]
    for milestone in reversed(milestones):
        values = [
            (record, value)
            for record in search.records
            if (value := _value_at(record, milestone, search.metric)) is not None
        ]
        if len(values) >= FEWEST_TRIALS:
            return Compared(milestone, values)
    return None


def _value_at(record: TrialRecord, milestone: int, metric: str) -> float | None:
    """Return the metric at the first report from the milestone on; with 0, of a full trial."""
    if milestone == 0:
        return value_of(record, metric) if record.state == "completed" else None
    for report in record.reports:
        if report.samples_seen >= milestone:
            value: float | None = report.metrics.get(metric)
            return value
    return None


def importances(
    parameters: Sequence[Parameter], compared: Compared, mode: str
) -> tuple[list[tuple[str, float]], list[str]]:
    """Return the searched keys with their shares, the largest first, and what Optuna remarks.

    The shares add up to 1; there are none if all trials have the same value.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    distributions = {p.key: _distribution(p) for p in parameters if len(set(p.values)) > 1}
    by_key = {parameter.key: parameter for parameter in parameters}
    for record, value in compared.values:
        params = {
            key: record.parameters[key]
            for key in distributions
            if key in record.parameters and by_key[key].contains(record.parameters[key])
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions={key: distributions[key] for key in params},
                value=value,
            )
        )
    if len({value for _, value in compared.values}) < 2:
        return [], []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=_good_share(len(compared.values))
        )
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    remarks = [f"Optuna: {w.message}" for w in warned if "experimental" not in str(w.message)]
    return sorted(shares.items(), key=lambda item: -item[1]), list(dict.fromkeys(remarks))


def _good_share(num_trials: int) -> float:
    return max(0.1, GOOD_TRIALS / num_trials)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.values)
    low, high = parameter.values
    is_log = parameter.kind.startswith("log_")
    if parameter.kind in ("int", "log_int"):
        return IntDistribution(low, high, log=is_log)  # type: ignore[arg-type]
    return FloatDistribution(low, high, log=is_log)  # type: ignore[arg-type]


_LAYOUT = {
    "xaxis": {"tickformat": ".0%", "rangemode": "tozero", "title": {"text": "share"}},
    "yaxis": {"automargin": True, "autorange": "reversed", "showgrid": False, "ticksuffix": "  "},
    "showlegend": False,
    "margin": {"t": 8, "r": 48},
}


def _bars(shares: Sequence[tuple[str, float]]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "y": [label(key) for key, _ in shares],
        "x": [compact(share) for _, share in shares],
        "text": [f"{100 * share:.0f} %" for _, share in shares],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "var(--completed)"},
        "width": 0.6,
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }


def _notes(compared: Compared) -> list[str]:
    num = len(compared.values)
    good = max(GOOD_TRIALS, round(_good_share(num) * num))
    where = (
        f"of the {num} trials that came to {count(compared.milestone)} samples, by their value then"
        if compared.milestone
        else f"of the {num} trials that ran their full budget"
    )
    notes = [
        f"PED-ANOVA: how much the values of a key among the best {good} {where}, differ from "
        "those of all of them. Shares add up to 100 %."
    ]
    if num < ENOUGH_TRIALS:
        notes.append(f"Rough: {num} trials are few; {ENOUGH_TRIALS} make it steadier.")
    return notes
