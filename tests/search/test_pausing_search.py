"""A search whose trials pause, from the real searcher and scheduler: what follows what, one slot.

Tune and the workers are left out: trials report what a formula says, as soon as they are asked.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from nanovlm.cluster.relay import (
    FAILURE,
    INFEASIBLE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    VALUES,
)
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import End, TrialRecord
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import RUNGS_FILE
from nanovlm.samplers.history import OTHERS
from nanovlm.search.plan import SearchPlan
from nanovlm.search.searcher import Pauses, RungScheduler, StudySearch
from nanovlm.search.stages import Search
from nanovlm.search.warm_start import EarlierTrials, Lengths, learn_from
from tests.full_disk import files_end_at
from tests.records import make_record, make_report, make_speed

MILESTONES = (100, 300, 900)
ENDS = (*MILESTONES, 2700)
NUM_TRIALS = 14

SPACE = """
search:
  lr_mp: {log_uniform: [1e-4, 1e-1]}
  warmup_ratio: {uniform: [0.0, 0.1]}
  batch_size: {choice: [64, 128, 256]}
scheduler: {rungs: 4, reduction_factor: 3}
"""


def space_of(folder: Path, **overrides: Any) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(SPACE)
    return load_space(path, overrides)


def score(values: dict[str, Any], samples: int) -> float:
    """Best at lr_mp = 1e-2, and growing."""
    return -abs(math.log10(values["lr_mp"]) + 2) + math.log10(samples) - values["warmup_ratio"]


def seconds(values: dict[str, Any]) -> float:
    """Of a sample: small batches and high rates take long."""
    return 0.001 * (256 / values["batch_size"]) * (1 + 10 * values["lr_mp"])


TWO = [{"metric": "mmstar_accuracy"}, {"metric": "seconds_per_sample"}]


class Killed(Exception):
    """The program was ended by force."""


@dataclass
class Records:
    """What survives a program besides the study and the rungs: it stands for trials.jsonl and
    paused.jsonl."""

    ended: dict[int, TrialRecord] = field(default_factory=dict)
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    num_reports: dict[int, int] = field(default_factory=dict)


class Program:
    """One run of the program in a folder that may hold what earlier ones have left."""

    def __init__(
        self,
        folder: Path,
        records: Records,
        may_go_on: Callable[[], bool],
        earlier: tuple[EarlierTrials, ...] = (),
        **more: Any,
    ) -> None:
        self.space = space_of(folder, **more.pop("overrides", {}))
        rungs = build_rungs(self.space, MILESTONES, folder / RUNGS_FILE)
        assert isinstance(rungs, PausingHalving)
        self.rungs, self.records, self.may_go_on = rungs, records, may_go_on
        self.searcher: StudySearch = StudySearch(
            self.space,
            folder,
            1,
            StopSwitch(),
            MILESTONES,
            list(records.ended.values()),
            most_trials=NUM_TRIALS,
            pauses=Pauses(rungs, self._on_decision, **more),
        )
        learn_from(self.searcher.recorder, earlier, ENDS[-1])
        self.scheduler = RungScheduler(rungs, self._on_decision)

    def _on_decision(self, decision: PruningDecision) -> None:
        if not (decision.goes_on or decision.is_paused):
            self._end(decision.number, End.PRUNED)

    def _end(self, number: int, end: End) -> None:
        values = self.records.values[number]
        reports = [
            make_report(
                samples,
                {"mmstar_accuracy": score(values, samples)},
                speed=make_speed(samples_per_second=1 / seconds(values)),
            )
            for samples in ENDS[: self.records.num_reports.get(number, 0)]
        ]
        self.records.ended[number] = make_record(
            number, end=end, parameters=values, reports=reports
        )

    def legs(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Run the search; yield the number of each leg's trial and where it reported."""
        tune_id = 0
        while True:
            suggestion: Any = self.searcher.suggest(str(tune_id))
            if suggestion == Searcher.FINISHED:
                return
            assert suggestion is not None, "with one slot there is always something to do"
            number, values = suggestion[NUMBER], suggestion[VALUES]
            self.records.values[number] = values
            yield number, tuple(self._run(str(tune_id), number, values))
            tune_id += 1

    def _run(self, tune_id: str, number: int, values: dict[str, Any]) -> Iterator[int]:
        none: Any = None
        trial: Any = type("Trial", (), {"config": {NUMBER: number}, "trial_id": tune_id})
        if values["warmup_ratio"] > 0.085:
            result = {FAILURE: "out of memory", INFEASIBLE: True, SAMPLES_SEEN: 0}
            result["mmstar_accuracy"] = math.nan
            self._end(number, End.OUT_OF_MEMORY)
            self.scheduler.on_trial_complete(none, trial, result)
            self.searcher.on_trial_complete(tune_id, result)
            return
        # A relay that begins again asks for all reports from the first one on, as after --resume.
        for samples in ENDS:
            is_final = samples == ENDS[-1]
            value = score(values, samples)
            result = {"mmstar_accuracy": value, SAMPLES_SEEN: samples, IS_FINAL: is_final}
            result["seconds_per_sample"] = 1 / (1 / seconds(values))
            made = self.records.num_reports.get(number, 0)
            self.records.num_reports[number] = max(made, ENDS.index(samples) + 1)
            yield samples
            if not self.may_go_on():
                raise Killed
            if is_final:
                self._end(number, End.COMPLETED)
                if not self.may_go_on():
                    raise Killed
                self.scheduler.on_trial_complete(none, trial, result)
                self.searcher.on_trial_complete(tune_id, result)
                return
            decision = self.scheduler.on_trial_result(none, trial, result)
            if not self.may_go_on():
                raise Killed
            if decision == "STOP":
                self.scheduler.on_trial_complete(none, trial, result)
                self.searcher.on_trial_complete(tune_id, result)
                return
            self.searcher.on_trial_result(tune_id, result)


def undisturbed(folder: Path, **more: Any) -> tuple[Program, list[int]]:
    folder.mkdir()
    program = Program(folder, Records(), lambda: True, **more)
    return program, [number for number, _ in program.legs()]


def test_trials_pause_go_on_and_end(tmp_path: Path) -> None:
    program, legs = undisturbed(tmp_path / "a")
    assert sorted(set(legs)) == list(range(NUM_TRIALS)) == sorted(program.records.ended)
    assert len(legs) > NUM_TRIALS, "some went on"
    ends = [record.end for record in program.records.ended.values()]
    assert 1 <= ends.count(End.COMPLETED) <= 3
    assert program.rungs.paused == {}
    states = {t.user_attrs[NUMBER]: t.state for t in program.searcher.study.get_trials()}
    for number, record in program.records.ended.items():
        is_full = record.end is End.COMPLETED
        assert states[number] is (TrialState.COMPLETE if is_full else TrialState.PRUNED)


def shorter_search() -> EarlierTrials:
    """Return the trials of an earlier search, of a third of the length."""
    values = [
        {"lr_mp": 0.0002 * 1.7**number, "warmup_ratio": 0.01, "batch_size": 64}
        for number in range(12)
    ]
    records = [
        make_record(number, parameters=v, metrics={"mmstar_accuracy": score(v, 900)})
        for number, v in enumerate(values)
    ]
    shares = {record.trial_id: (1.0,) for record in records}
    return EarlierTrials("older", tuple(records), {}, (), lengths=Lengths(900, 2700, shares))


@pytest.mark.parametrize(
    ("overrides", "earlier"),
    [
        ({"sampler.name": "auto"}, ()),
        ({"sampler.name": "tpe"}, ()),
        ({"objective": TWO}, ()),
        ({"sampler.name": "auto"}, "shorter"),
    ],
    ids=["auto", "tpe", "two objectives", "earlier search"],
)
def test_a_search_that_is_killed_anywhere_is_the_same(
    tmp_path: Path, overrides: dict[str, Any], earlier: Any
) -> None:
    more: dict[str, Any] = {"overrides": overrides, "earlier": earlier and (shorter_search(),)}
    whole, _ = undisturbed(tmp_path / "whole", **more)
    folder, records = tmp_path / "killed", Records()
    folder.mkdir()
    for lived in range(1, 100):
        moments = iter([True] * lived)
        may_go_on = functools.partial(next, moments, False)
        program = Program(folder, records, may_go_on, **more)
        try:
            for _ in program.legs():
                pass
        except Killed:
            continue
        break
    ended = records.ended
    assert {n: dict(r.parameters) for n, r in ended.items()} == {
        n: dict(r.parameters) for n, r in whole.records.ended.items()
    }
    assert {n: r.end for n, r in ended.items()} == {
        n: r.end for n, r in whole.records.ended.items()
    }
    curves = [
        {
            t.user_attrs.get(NUMBER): (t.intermediate_values, t.user_attrs.get(OTHERS), t.state)
            for t in p.searcher.study.trials
        }
        for p in (program, whole)
    ]
    assert curves[0] == curves[1]
    told = [p.searcher.correlations() for p in (program, whole)]
    assert told[0] == told[1] and bool(told[0]) is bool(earlier)


def test_a_slot_asks_while_another_gives_a_trial_back(tmp_path: Path) -> None:
    """Between the decision on a trial and its end for Tune it neither goes on nor ends."""
    ids = itertools.count()
    asked: deque[tuple[str, int, dict[str, Any]]] = deque()
    in_slots: set[int] = set()

    def ask() -> bool:
        tune_id = f"trial {next(ids)}"
        suggestion: Any = program.searcher.suggest(tune_id)
        assert suggestion != Searcher.FINISHED or not in_slots
        if suggestion is not None and suggestion != Searcher.FINISHED:
            number = suggestion[NUMBER]
            assert number not in in_slots, "it has not given its slot back"
            in_slots.add(number)
            program.records.values[number] = suggestion[VALUES]
            asked.append((tune_id, number, suggestion[VALUES]))
        return True

    program = Program(tmp_path, Records(), lambda: len(asked) > 2 or ask(), max_states=2)
    legs: list[int] = []
    while ask() and asked:
        while asked:
            tune_id, number, values = asked.popleft()
            legs.append(number)
            list(program._run(tune_id, number, values))
            in_slots.remove(number)
    assert sorted(set(legs)) == list(range(NUM_TRIALS)) == sorted(program.records.ended)
    assert len(legs) > NUM_TRIALS and program.rungs.paused == {}


def test_a_verdict_that_cannot_be_written_ends_the_search_in_order(tmp_path: Path) -> None:
    program = Program(tmp_path, Records(), lambda: True)
    for _ in program.legs():
        if program.rungs._promotable() is not None:
            break
    paused = set(program.rungs.paused)
    with files_end_at((tmp_path / RUNGS_FILE).stat().st_size):
        assert program.searcher.suggest("one more") is None
    switch = program.searcher._switch
    assert switch.is_thrown() and isinstance(switch.error, OSError)
    assert set(program.rungs.paused) == paused, "nothing is decided that is not written down"
    again = Program(tmp_path, program.records, lambda: True)
    assert again.searcher.suggest("one more") is not None
    assert len(again.rungs.paused) == len(paused) - 1


def test_states_beyond_the_limit_are_dropped_once(tmp_path: Path) -> None:
    dropped: list[int] = []
    program, legs = undisturbed(tmp_path / "a", max_states=2, drop_state=dropped.append)
    assert dropped and len(dropped) == len(set(dropped))
    unlimited, same = undisturbed(tmp_path / "b")
    assert legs == same, "what is kept decides nothing"
    assert program.records.ended.keys() == unlimited.records.ended.keys()


def test_a_person_is_told_how_well_an_earlier_search_foresaw_the_trials(tmp_path: Path) -> None:
    program, _ = undisturbed(tmp_path / "a", earlier=(shorter_search(),))
    events: list[Any] = []
    plan = SearchPlan(space_of(tmp_path), MILESTONES, ENDS[-1], data={})
    search = Search(plan, tmp_path, lambda *_: None, events.extend)
    search._notify_of_correlations(program.searcher)
    (told,) = [event.text for event in events]
    (correlation,) = program.searcher.correlations().values()
    assert (
        told.startswith("warm start: what /") and f"rank correlation of {correlation:.2f}" in told
    )


def test_a_person_is_told_of_a_milestone_that_ceases_to_decide(tmp_path: Path) -> None:
    events: list[Any] = []
    plan = SearchPlan(space_of(tmp_path), MILESTONES, ENDS[-1], data={})
    search = Search(plan, tmp_path, on_start=lambda *_: None, on_events=events.extend)
    rungs = build_rungs(plan.space, MILESTONES)
    assert isinstance(rungs, PausingHalving)
    committed: list[PruningDecision] = []
    for number in range(60):
        decision = rungs.decide(number, 100, 0.5 + (number * 7 % 60) / 200)
        search._take_decision(committed.append, rungs, decision)
        promoted = decision if decision.goes_on else rungs.promote()
        if promoted is not None:
            decision = rungs.decide(promoted.number, 300, 1 - promoted.value)
            search._take_decision(committed.append, rungs, decision)
    assert [event.text for event in events] == [
        "mmstar_accuracy at 100 samples says nothing of what trials come to later (rank "
        "correlation -1.00), so trials pass that milestone without a comparison"
    ]
