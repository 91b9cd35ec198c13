"""The replayed searches: what the clock counts, and that better methods look better."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.replay import GRID, load, replay, search
from benchmarks.replay_clock import ENOUGH_TRIALS, Leaders, Run, simulate
from benchmarks.replay_methods import METHODS, RandomSearch, Setting
from benchmarks.replay_reached import describe, reached
from benchmarks.replay_table import CurveTable
from nanovlm.config.sources import get_value


class Counting(RandomSearch):
    """Random search that knows how many of its trials run."""

    def __init__(self, table: CurveTable, seed: int) -> None:
        super().__init__(table, seed)
        self.running = self.most = 0

    def start(self) -> Run | None:
        self.running += 1
        self.most = max(self.most, self.running)
        return super().start()

    def report(self, run: Run) -> bool:
        self.running -= 1
        return super().report(run)


def test_the_recorded_trainings() -> None:
    table, _ = load()
    assert len(table) == 240
    assert table.values.min() >= 0 and table.values.max() < 1
    assert (np.diff(table.seen, axis=1) > 0).all()
    assert (table.seen[:, -1] == table.budget).all()
    assert [table.row_at(point) for point in table.points[:20]] == list(range(20))
    assert table.column_of_share(1 / 3) == 5 and table.column_of_share(1.0) == table.last


def test_a_configuration_is_looked_up_by_its_values() -> None:
    table, space = load()
    values = space.default_values()
    row = table.row_of(values)
    assert 16 <= get_value(space.base, "batch_size") <= 64
    assert abs(table.points[row] - table.points[table.row_of(values)]).max() == 0


@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_clock(concurrency: int) -> None:
    table, _ = load()
    method = Counting(table, seed=0)
    trace = simulate(table, method, concurrency, limit=6 * table.budget)
    assert trace.num_full == 6 and trace.spent == 6 * table.budget
    assert trace.time == 6 * table.budget / concurrency
    assert method.most == concurrency
    again = RandomSearch(table, 0)
    drawn = [again.draw() for _ in range(6)]
    assert trace.picks[-1].row in drawn
    finals = table.values[drawn, -1]
    assert table.values[trace.picks[-1].row, -1] == finals.max()


def test_the_pick_is_the_best_where_enough_trials_have_been() -> None:
    leaders = Leaders()
    assert leaders.add(0, 0.3, 7) == 7
    assert leaders.add(2, 0.9, 7) == 7, "its value at the end says nothing yet"
    for row, value in enumerate([0.4, 0.6, 0.5][:ENOUGH_TRIALS]):
        picked = leaders.add(0, value, row)
    assert picked == 1


@pytest.mark.parametrize("name", [name for name in METHODS if "top" not in name])
def test_no_method_spends_more_than_it_may(name: str) -> None:
    table, _ = load()
    trace = search(name, concurrency=4, seed=0)
    assert 0 < trace.spent <= 12 * table.budget
    assert trace.num_full <= trace.num_trials
    assert [pick.spent for pick in trace.picks] == sorted(pick.spent for pick in trace.picks)


def test_one_epoch_then_the_best_spends_the_reference(tmp_path: Path) -> None:
    table, space = load()
    setting = Setting(table, space, 0, 4, 8 * table.budget, tmp_path)
    method: Any = METHODS["one epoch, then top 2"](setting)
    trace = simulate(table, method, 4, limit=20 * table.budget)
    assert trace.num_full == 2
    assert 7.5 * table.budget < trace.spent <= 8 * table.budget


def test_a_search_finds_more_than_full_trainings_for_its_first_compute() -> None:
    place = int(np.argmin(abs(GRID - 4)))
    ours = replay("tpe + asha", num_seeds=10, concurrency=4)[:, place]
    full = replay("random, full", num_seeds=10, concurrency=4)[:, place]
    assert np.median(ours) < np.median(full)


def test_by_time_a_waiting_slot_costs_as_much_as_one_that_trains() -> None:
    places = [int(np.argmin(abs(GRID - trainings))) for trainings in (1, 6, 7.9)]
    busy, waits = "random, full", "one epoch, then top 3"
    curves = {
        name: [replay(name, num_seeds=5, concurrency=4, by=by) for by in ("compute", "time")]
        for name in (busy, waits)
    }
    by_compute, by_time = (curve[:, places] for curve in curves[busy])
    assert np.array_equal(by_compute, by_time)
    by_compute, by_time = (curve.mean(axis=0) for curve in curves[waits])
    assert (by_time[places] >= by_compute[places]).all()
    assert (by_time > by_compute).any(), "in its last trainings a slot waits"


def test_what_a_search_has_reached() -> None:
    table, _ = load()
    trace = search("tpe + asha", concurrency=4, seed=0)
    ends = reached(trace, table.last, trace.spent)
    assert len(ends) == trace.num_full
    assert len(reached(trace, table.last, trace.spent / 2)) < len(ends)
    spent = 8.0 * table.budget
    text = describe(table, [trace], 8.0)
    picked = trace.picked(spent=spent)
    assert picked is not None and f"what is picked: {table.regret(picked):.4f}" in text
    assert len(text.splitlines()) == 1 + len({report.column for report in trace.reports})
