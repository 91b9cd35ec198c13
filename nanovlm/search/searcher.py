"""Where trials come from: Optuna, through Tune's `OptunaSearch`, told what really happened.

Tune's own class tells every trial that the scheduler stopped as COMPLETE, one that ran out of
memory FAIL, which samplers overlook, and one without a number never; `ToldStudy` has other words.
For Tune a trial of its own lasts from a start to a pause: a trial that goes on after it paused, or
after the program was interrupted, is suggested again under its number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from nanovlm.cluster.relay import (
    FAILURE,
    INFEASIBLE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    UNFINISHED,
    VALUES,
)
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import SearchSpace
from nanovlm.messages import TrialRecord
from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.samplers.configurations import RunConfigurations, can_repeat
from nanovlm.samplers.milestone_sampler import CORRELATIONS
from nanovlm.samplers.optuna_samplers import build_history, build_sampler, suggest
from nanovlm.search.sampler_failures import SamplerFailures
from nanovlm.search.study import StudyFileStorage, StudyPlace, open_study, patiently
from nanovlm.search.told_study import IMPORTED, SEARCH, OpenTrial, ToldStudy

T = TypeVar("T")

_JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Pauses:
    """How trials that pause are gone on with and ended."""

    rungs: PausingHalving
    on_decision: Callable[[PruningDecision], None] = lambda decision: None
    """Told what becomes of a trial that has paused."""
    max_states: int | None = None
    """Paused trials whose states are kept at most; None keeps all."""
    let_go: Callable[[int], None] = lambda number: None
    """Told the number of a paused trial whose state is not kept."""


def build_searcher(
    space: SearchSpace,
    folder: Path,
    concurrency: int,
    switch: StopSwitch,
    milestones: Sequence[int] = (),
    earlier: Sequence[TrialRecord] = (),
    failures: SamplerFailures | None = None,
    *,
    most_trials: int | None = None,
    pauses: Pauses | None = None,
) -> "StudySearch":
    """Return the searcher of a space; the study of its results folder is gone on with.

    Args:
        milestones: samples seen at which trials are compared.
        earlier: trials of the folder that have ended.
        failures: counts those of the sampler, and tells a person what goes wrong.
        most_trials: the search is of so many trials, the earlier ones included; None sets no end.
        pauses: given if trials pause at the milestones.

    Raises:
        UserError: the storage cannot be reached, or the study is of another space.
    """
    place = open_study(space, folder)
    searcher = StudySearch(
        space, place, concurrency, switch, milestones, failures, most_trials, pauses
    )
    searcher.take_up(earlier)
    return searcher


class StudySearch(OptunaSearch):
    """OptunaSearch that numbers its trials and tells Optuna how each of them ended.

    The number is an attribute of Optuna's trial and not Optuna's own, which counts imported trials
    and those of other searches in the same study too.
    """

    def __init__(
        self,
        space: SearchSpace,
        place: StudyPlace,
        concurrency: int,
        switch: StopSwitch,
        milestones: Sequence[int],
        failures: SamplerFailures | None = None,
        most_trials: int | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        super().__init__(
            space=lambda trial: suggest(space.parameters, trial),
            metric=space.objective.metric,
            mode=space.objective.mode,
            study_name=place.name,
            storage=place.storage,
        )
        self._search_space = space
        self._place = place
        self._concurrency = concurrency
        self._switch = switch
        self._milestones = tuple(milestones)
        self._most_trials = most_trials
        self._pauses = pauses
        self._told = ToldStudy(self.study, place, space, milestones)
        self._failures = failures or SamplerFailures()
        self._failures.sampler = space.sampler.name
        self._open: dict[str, OpenTrial] = {}  # by Tune's id
        self._paused: dict[int, OpenTrial] = {}  # by number
        self._let_go: set[int] = set()  # numbers of paused trials whose states are not kept
        self._to_run: deque[OpenTrial] = deque()
        self._next_number = 0
        self._history = build_history(space)
        self._run = RunConfigurations(space)

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return Searcher, ()  # Tune pickles it to a file; the study's URL may have a password

    @property
    def study(self) -> optuna.Study:
        assert self._ot_study is not None, "the space was given, so the study is there"
        return self._ot_study

    # ------------------------------------------------------------------ Tune's side

    def reason_to_end(self) -> str | None:
        """Return why there is no trial to run or to wait for, None if there is one."""
        is_busy = self._to_run or self._open or self._paused
        return None if is_busy else self._run.reason_to_end()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return number and values of the next trial: one to go on with, or else a new one.

        FINISHED if nothing is left to run; None if the storage or a decision cannot be written, or
        as long as what a trial comes to may let another one run.
        """
        try:
            return self._suggest(trial_id)
        except OSError as error:  # of the rungs' log: the study's are waited for
            self._switch.fail(error)
            return None

    def _suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._to_run and (next_trial := self._next_trial()) is not None:
            self._to_run.append(next_trial)
        if not self._to_run:
            if self._has_new_trials() or (self._may_run_more() and self._open):
                return None
            self._end_paused()
            return self.FINISHED  # type: ignore[return-value]
        opened = self._open[trial_id] = self._to_run.popleft()
        return {NUMBER: opened.number, VALUES: opened.values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._patiently(lambda: self._report(self._open[trial_id], result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        opened = self._open.pop(trial_id, None)
        if opened is None or (result and UNFINISHED in result):
            return
        if self._pauses is not None and opened.number in self._pauses.rungs.paused and result:
            self._paused[opened.number] = opened
            self._patiently(lambda: self._report(opened, result))
            return
        has_ended = result and (result.get(IS_FINAL) or FAILURE in result)
        if self._switch.is_thrown() and not has_ended:
            return  # it ends because the search does; the records tell how
        judged = None if error else _decided(result)
        if judged is None:
            self._run.fail(opened.values)
        self._patiently(lambda: self._tell(opened, judged))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing of use: the study is in its storage, and Tune's state is not read again."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    # ------------------------------------------------------------------ which trial is next

    def _next_trial(self) -> OpenTrial | None:
        """Return the trial that a free slot takes; None: none now."""
        if (paused := self._promoted()) is not None:
            return paused
        self._patiently(self._take_in_other_searches)
        return self._patiently(self._ask) if self._has_new_trials() else None

    def _has_new_trials(self) -> bool:
        """Return whether a trial may begin."""
        if self._next_number == 0:
            return True  # the default configuration always runs
        is_over = self._most_trials is not None and self._next_number >= self._most_trials
        return not is_over and self._run.num_left != 0

    def _may_run_more(self) -> bool:
        """Return whether one of the trials that run now may let another one run."""
        return self._pauses is not None or self._run.num_left == 0

    def _promoted(self) -> OpenTrial | None:
        """Return the paused trial that goes on now, if there is one; end those without a chance,
        and let the states of the last ones go if there are too many."""
        if self._pauses is None:
            return None
        rungs = self._pauses.rungs
        # A trial is judged before Tune has ended it: until then its slot is not free again.
        decision, ended, let_go = rungs.fill_slot(
            is_last=not self._has_new_trials(),
            most_trials=self._most_trials,
            max_states=self._pauses.max_states,
            arrived=self._paused,
        )
        if decision is not None:
            self._pauses.on_decision(decision)
            self._let_go.discard(decision.number)
        self._end_decisions(ended)
        for number in let_go:
            if number in self._paused and number not in self._let_go:
                self._let_go.add(number)
                self._pauses.let_go(number)
        return None if decision is None else self._paused.pop(decision.number)

    def _end_paused(self) -> None:
        """End the trials that still wait: nothing runs with which they could be compared."""
        if self._pauses is not None:
            self._end_decisions(self._pauses.rungs.end_all())

    def _end_decisions(self, decisions: Iterable[PruningDecision]) -> None:
        assert self._pauses is not None, "only these decisions come without a report"
        for decision in decisions:
            self._pauses.on_decision(decision)
            opened = self._paused.pop(decision.number)
            self._patiently(lambda: self._told.prune(opened))  # noqa: B023

    # ------------------------------------------------------------------ what Optuna is told

    def _ask(self) -> OpenTrial:
        number, errors = self._next_number, list[Exception]()
        self.study.sampler = build_sampler(
            self._search_space,
            self._concurrency,
            number,
            self._history,
            self._run.has_run,
            errors.append,
            self._milestones,
        )
        trial = self.study.ask()
        values = suggest(self._search_space.parameters, trial)
        if number > 0:  # trial 0 is the default configuration
            self._failures.count(number, trial, errors)
        trial.set_user_attr(SEARCH, self._place.search_id)
        trial.set_user_attr(NUMBER, number)
        trial.set_user_attr(VALUES, values)  # last: a trial that has them is whole
        self._next_number += 1
        self._run.begin(values)
        return OpenTrial(number, values, trial)

    def _report(self, opened: OpenTrial, result: dict[str, Any]) -> None:
        is_final = bool(result.get(IS_FINAL))
        values = self._search_space.objective.values_in(result)
        self._told.report(opened, result[SAMPLES_SEEN], values, is_final)

    def _tell(self, opened: OpenTrial, result: dict[str, Any] | None) -> None:
        if result is None:
            self._told.fail(opened)
        elif FAILURE in result:
            self._told.set_infeasible(opened)
        else:
            self._report(opened, result)
            if result.get(IS_FINAL):
                self._told.complete(opened, result[self.metric])
            else:
                self._told.prune(opened)

    # ------------------------------------------------------------------ what was before

    def take_up(self, records: Sequence[TrialRecord]) -> None:
        """Bring the study in line with the trials that have ended; go on with those under way.

        `trials.jsonl`, the study and the rungs are written one after the other, so after a kill
        any of them may know more; after a power loss the study may lack trials. A trial that never
        got its values is told FAIL.
        """
        ours = self._told.ours()
        for number, frozen in ours.items():
            if number > 0:
                self._failures.restore(frozen)
        ended = {record.number: record for record in records}
        for number, record in ended.items():
            if number not in ours:
                self._told.add(record)
        self._told.tell_ended(records)
        self._run = RunConfigurations(self._search_space, records)
        paused = {} if self._pauses is None else self._pauses.rungs.paused
        for number in sorted(ours.keys() - ended.keys()):
            opened = self._told.reopen(ours[number])
            if number in paused:
                self._paused[number] = opened
                last = paused[number]
                self._told.report(opened, last.samples_seen, last.values, is_final=False)
            else:
                self._to_run.append(opened)
            self._run.begin(opened.values)
        self._next_number = 1 + max((*ours, *ended), default=-1)

    def _take_in_other_searches(self) -> None:
        """Take note of what other searches in the same database have run to the end."""
        is_ours_alone = isinstance(self._place.storage, StudyFileStorage)
        if is_ours_alone or not can_repeat(self._search_space.parameters):
            return
        for trial in self.study.get_trials(deepcopy=False, states=_JUDGED):
            if VALUES in trial.user_attrs and IMPORTED not in trial.user_attrs:
                self._run.begin(trial.user_attrs[VALUES])

    def tell_ended(self, records: Sequence[TrialRecord]) -> None:
        """Tell Optuna of trials that have ended, but not through Tune, such as at the end of the
        budget. If the storage is away when the search ends, `take_up` tells it with --resume."""
        self._patiently(lambda: self._told.tell_ended(records))

    def import_trial(
        self, record: TrialRecord, source: str, is_full: bool, shares: Sequence[float] | None = None
    ) -> bool:
        """Let the sampler learn from a trial of another search; see `ToldStudy.add_imported`."""
        return self._told.add_imported(record, source, is_full, shares)

    def correlations(self) -> dict[str, float]:
        """Return how well the earlier searches of other lengths foresaw what trials came to, by
        their names: rank correlations, as the sampler noted them last."""
        trials = self._patiently(lambda: self.study.get_trials(deepcopy=False)) or []
        told = [t.system_attrs[CORRELATIONS] for t in trials if CORRELATIONS in t.system_attrs]
        return told[-1] if told else {}

    def _patiently(self, do: Callable[[], T]) -> T | None:
        return patiently(do, self._place, self._switch, self._failures.tell)


def _decided(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a trial's last result, None if it failed for no fault of its values."""
    if not result or (FAILURE in result and not result.get(INFEASIBLE)):
        return None
    return result
