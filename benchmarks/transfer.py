"""Searches on the simulated clock that learn from an earlier one, of another length.

The earlier search is a real one too. Its compute is not counted: what is measured is what the
later search has after so many full trainings of its own.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from optuna.trial import TrialState

from benchmarks.replay_clock import Method, simulate
from benchmarks.replay_methods import Build, Setting, our
from benchmarks.replay_search import TuneLoop
from benchmarks.replay_table import Curves
from nanovlm.cluster.relay import NUMBER, VALUES
from nanovlm.messages import End, Report, TrialRecord
from nanovlm.search.warm_start import EarlierTrials, Lengths, learn_from

_SLOTS = 8
"""Of the earlier search."""


def after(older: Callable[[Setting], Curves], trainings: float, shuffled: bool = False) -> Build:
    """Return what builds the default search after an earlier one.

    Args:
        older: makes the curves of the earlier search.
        trainings: compute of the earlier search, in full trainings of the later one.
        shuffled: whether the earlier trials swap their curves, so that they tell nothing.
    """
    default = our("auto", "asha", type="pausing", rungs=3)

    def build(setting: Setting) -> Method:
        curves, folder = older(setting), setting.folder / "older"
        folder.mkdir()
        limit = round(trainings * setting.table.budget)
        search = default(replace(setting, table=curves, seed=setting.seed + 1, folder=folder))
        simulate(curves, search, _SLOTS, limit)
        records = trial_records(search, setting.space.objective.metric)
        if shuffled:
            order = np.random.default_rng(setting.seed).permutation(len(records))
            values = [records[place].parameters for place in order]
            records = [replace(r, parameters=v) for r, v in zip(records, values, strict=True)]
        method = default(setting)
        assert isinstance(method, TuneLoop), "it is our own search"
        shares = {
            r.trial_id: tuple(report.samples_seen / curves.budget for report in r.reports)
            for r in records
        }
        lengths = Lengths(curves.budget, setting.table.budget, shares)
        earlier = EarlierTrials("older", tuple(records), {}, (), lengths=lengths)
        learn_from(method.searcher.recorder, (earlier,), setting.table.budget)
        return method

    return build


def trial_records(search: Method, metric: str) -> list[TrialRecord]:
    """Return the records of a simulated search's trials that have reported; those under way count
    as stopped."""
    assert isinstance(search, TuneLoop), "it is our own search"
    return [
        TrialRecord(
            trial_id=f"trial-{trial.user_attrs[NUMBER]:04d}",
            number=trial.user_attrs[NUMBER],
            parameters=trial.user_attrs[VALUES],
            config={},
            end=End.COMPLETED if trial.state is TrialState.COMPLETE else End.PRUNED,
            reports=tuple(
                Report(samples_seen=samples, step=0, metrics={metric: value}, seconds=0)
                for samples, value in sorted(trial.intermediate_values.items())
            ),
            submitted_at=0,
        )
        for trial in search.searcher.study.get_trials(deepcopy=False)
        if trial.intermediate_values
    ]
