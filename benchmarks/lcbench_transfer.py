"""Searches on LCBench that learn from an earlier search, which is of another length.

The earlier search is a real one too, on the simulated clock. Its compute is not counted: the
regrets are those after so many full trainings of the later search.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.lcbench_curves import SurrogateCurves
from benchmarks.lcbench_space import METRIC
from benchmarks.lcbench_surrogate import CHOOSE, FINAL
from benchmarks.replay_clock import Method, Trace, simulate
from benchmarks.replay_methods import Build, Setting, our
from benchmarks.replay_search import TuneLoop
from nanovlm.messages import End, Report, TrialRecord
from nanovlm.search.earlier_lengths import Lengths
from nanovlm.search.warm_start import EarlierTrials, learn_from

_TASKS = (*CHOOSE, *FINAL)

Older = Callable[[Setting], SurrogateCurves]
"""Makes the curves of the earlier search."""


def after(older: Older, trainings: float, shuffled: bool = False) -> Build:
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
        there = replace(setting, table=curves, seed=setting.seed + 1, limit=limit, folder=folder)
        search = default(there)
        assert isinstance(search, TuneLoop), "it is our own search"
        records = trial_records(search, curves, simulate(curves, search, 8, limit))
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
        learn_from(method.searcher, (earlier,), setting.table.budget)
        return method

    return build


def trial_records(search: TuneLoop, curves: SurrogateCurves, trace: Trace) -> list[TrialRecord]:
    """Return the records of a simulated search's trials; the number of a trial is its row."""
    return [
        TrialRecord(
            trial_id=f"trial-{number:04d}",
            number=number,
            parameters=values,
            config={},
            end=End.COMPLETED if reached[-1].column == curves.last else End.PRUNED,
            reports=tuple(
                Report(
                    samples_seen=curves.samples(number, report.column),
                    step=0,
                    metrics={METRIC: report.value},
                    seconds=0,
                )
                for report in reached
            ),
            submitted_at=0,
        )
        for number, values in search.values().items()
        if (reached := [report for report in trace.reports if report.row == number])
    ]


def shorter(epochs: int) -> Older:
    """Return what makes the curves of the same task in their first epochs, with other noise."""
    return lambda setting: _curves(setting).of(num_epochs=epochs, noise_seed=_noise(setting))


def another_task(setting: Setting) -> SurrogateCurves:
    """Return the curves of another task, which differs by the seed."""
    curves = _curves(setting)
    place = _TASKS.index(curves.task) + 1 + setting.seed % (len(_TASKS) - 1)
    return curves.of(task=_TASKS[place % len(_TASKS)], noise_seed=_noise(setting))


def _curves(setting: Setting) -> SurrogateCurves:
    assert isinstance(setting.table, SurrogateCurves), "the methods are of this benchmark"
    return setting.table


def _noise(setting: Setting) -> int:
    return zlib.crc32(f"older {setting.seed}".encode())


TRANSFERS: dict[str, Build] = {
    "auto, after a tenth": after(shorter(5), trainings=2),
    "auto, after another task": after(another_task, trainings=16),
    "auto, after shuffled trials": after(shorter(5), trainings=2, shuffled=True),
}
