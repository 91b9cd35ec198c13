"""The two stages of a search on real Ray, with trials that only pretend to train."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.worker_pool import OnStart
from nanovlm.config.space import load_space
from nanovlm.errors import UserError
from nanovlm.messages import End, Notice, TrialRecord
from nanovlm.search.plan import SearchPlan
from nanovlm.search.stages import ResumeState, Search
from tests.results.starts import DATA
from tests.search.fake_trials import (
    HangOnce,
    pretend,
    pretend_to_diverge,
    pretend_without_objective,
)
from tests.worker_threads import worker_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

SPACE = """
preset: digits
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
confirm: {top: 2, runs: 7}
"""


class Run:
    """A search in a folder, and what it told."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "space.yaml").write_text(SPACE)
        space = load_space(folder / "space.yaml", overrides)
        data = {part: {**DATA[part], "folder": part} for part in DATA}
        self.plan = SearchPlan(space, (100, 300), 900, data)
        self.folder = folder
        self.ended: list[TrialRecord] = []
        self.confirmed: list[TrialRecord] = []
        self.notices: list[str] = []

    def __call__(
        self,
        run_trial: Any = pretend,
        earlier: ResumeState | None = None,
        concurrency: int = 1,
        on_start: OnStart = lambda *_: None,
    ) -> str:
        return Search(
            self.plan,
            self.folder,
            on_start=on_start,
            on_events=self._take,
            earlier=earlier or ResumeState(),
            concurrency=concurrency,
            start_workers=functools.partial(worker_threads, run_trial=run_trial),
        ).run()

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TrialRecord) and event.end is not None:
                (self.confirmed if event.confirms else self.ended).append(event)
            elif isinstance(event, Notice):
                self.notices.append(event.text)


def test_a_limit_ends_the_first_stage_and_the_second_one_follows(tmp_path: Path) -> None:
    overrides = {"budget.trials": 50, "budget.target": 20.0, "scheduler.type": "stopping"}
    run = Run(tmp_path, **overrides)
    reason = run()
    assert reason.startswith("budget.target: trial ")
    best, second, *_ = sorted(
        (r for r in run.ended if r.number), key=lambda r: -r.metrics["mmstar_accuracy"]
    )
    assert best.metrics["mmstar_accuracy"] >= 20
    ahead = max(best, second, key=lambda r: r.parameters["lr_mp"])
    wanted = [(number, 1) for number in (best.number, 0, second.number)]
    wanted += [(number, seed) for seed in (2, 3) for number in (ahead.number, 0)]
    assert [(r.number, r.config["seed"]) for r in run.confirmed] == wanted

    again = Run(tmp_path, **overrides)
    earlier = ResumeState(tuple(run.ended), tuple(run.confirmed[:2]), seconds=10.0)
    assert again(earlier=earlier) == reason
    assert again.ended == []
    assert [(r.number, r.config["seed"]) for r in again.confirmed] == wanted[2:]


def test_trials_wait_for_their_turn(tmp_path: Path) -> None:
    run = Run(tmp_path, **{"budget.trials": 9, "confirm.top": 0})
    assert run(concurrency=2) == "budget.trials: 9 trials are done"
    assert sorted(record.number for record in run.ended) == list(range(9))
    for record in run.ended:
        assert [report.samples_seen for report in record.reports] == [100, 300, 900][
            : len(record.reports)
        ]
    lengths = [len(record.reports) for record in run.ended]
    assert lengths.count(1) >= 2 and lengths.count(3) >= 1
    by_value = max(run.ended, key=lambda record: record.reports[0].metrics["mmstar_accuracy"])
    assert by_value.end is End.COMPLETED, "the best at the first milestone went on to the end"
    stopped = [record for record in run.ended if record.end is End.PRUNED]
    assert stopped and all("is number" in (record.reason or "") for record in stopped)


def test_a_trial_that_hangs_goes_on_in_another_group(tmp_path: Path) -> None:
    overrides = {"budget.trials": 2, "confirm.top": 0, "resources.stall_minutes": 0.02}
    run = Run(tmp_path, **overrides, **{"scheduler.type": "stopping"})
    assert run(HangOnce()) == "budget.trials: 2 trials are done"
    (notice,) = run.notices
    assert notice == (
        "group-0: no sign of life for 0.02 minutes; trial-0000 goes on from its last report in a "
        "free group"
    )
    assert [(r.number, r.worker_group) for r in run.ended] == [(0, "group-1"), (1, "group-1")]
    assert run.ended[0].state == "completed" and len(run.ended[0].reports) == 3


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "größe 🙂 #1 'x'\n%20?"
    folder.mkdir()
    run = Run(folder, **{"budget.trials": 2, "confirm.top": 0})
    assert run() == "budget.trials: 2 trials are done"


def test_more_trials_may_be_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path, **{"budget.trials": 3, "confirm.top": 0})
    assert run() == "budget.trials: 3 trials are done"
    more = Run(tmp_path, **{"budget.trials": 5, "confirm.top": 0})
    assert more(earlier=ResumeState(tuple(run.ended))) == "budget.trials: 5 trials are done"
    assert sorted(record.number for record in more.ended) == [3, 4]


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"search": {"batch_size": {"choice": [16, 32, 64]}}}
    changes |= {"budget.trials": 20, "scheduler.name": "none", "confirm.runs": 2}
    run = Run(tmp_path, **changes)
    reason = "the space is used up: all 3 configurations have run"
    assert run(concurrency=2) == reason
    assert sorted(r.parameters["batch_size"] for r in run.ended) == [16, 32, 64]
    assert len(run.confirmed) == 2

    again = Run(tmp_path, **changes)
    assert again(earlier=ResumeState(tuple(run.ended), tuple(run.confirmed))) == reason
    assert again.ended == again.confirmed == []


def test_reports_without_the_objective_end_the_search_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, **{"budget.trials": 50})
    with pytest.raises(UserError) as refused:
        run(pretend_without_objective)
    assert str(refused.value) == (
        "objective.metric: the reports of trial-0000 have no 'mmstar_accuracy'. "
        "Choices: train_loss."
    )
    assert run.ended == []


def test_an_objective_that_is_not_finite_fails_the_trial(tmp_path: Path) -> None:
    run = Run(tmp_path, **{"budget.trials": 50})
    reason = run(pretend_to_diverge)
    assert reason == (
        "5 trials in a row failed: mmstar_accuracy is nan after 100 samples; "
        f"see {tmp_path / 'logs'}"
    )
    assert all(record.is_infeasible for record in run.ended)
