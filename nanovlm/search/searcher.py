"""What Ray Tune asks: which trial is next (`StudySearch`), which one goes on (`RungScheduler`).

For Tune a trial of its own lasts from a start to a pause: a trial that goes on after it paused, or
after the program was interrupted, is suggested again under its number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

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
from nanovlm.pruning.successive_halving import SuccessiveHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.samplers.configurations import can_repeat, suggest
from nanovlm.samplers.milestone_sampler import CORRELATIONS
from nanovlm.samplers.optuna_samplers import build_history, build_sampler
from nanovlm.search.limits import RunConfigurations
from nanovlm.search.study import open_study
from nanovlm.search.study_recorder import IMPORTED, OpenTrial, StudyRecorder

OnDecision = Callable[[PruningDecision], None]
"""Called with each decision when it is written to the folder."""

_COMPARED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Pauses:
    """How paused trials are resumed and ended."""

    rungs: PausingHalving
    on_decision: OnDecision = lambda decision: None
    max_states: int | None = None
    """Paused trials whose states are kept at most; None keeps all."""
    drop_state: Callable[[int], None] = lambda number: None
    """Called with the number of a paused trial whose state is not kept."""


class StudySearch(Searcher):
    """Asks Optuna for trials, numbers them and writes to its study how each of them ended.

    The number is an attribute of Optuna's trial and not Optuna's own, which counts imported trials
    and those of other searches in the same study too. Tune's own `OptunaSearch` writes COMPLETE for
    trials that the scheduler stopped, and FAIL, which samplers overlook, for those that ran out of
    memory.
    """

    def __init__(
        self,
        space: SearchSpace,
        folder: Path,
        concurrency: int,
        switch: StopSwitch,
        milestones: Sequence[int] = (),
        earlier: Sequence[TrialRecord] = (),
        notify: Callable[[str], None] = lambda text: None,
        *,
        num_slots: Callable[[], int] | None = None,
        most_trials: int | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        """Open the study of a results folder, or create it, and resume its trials.

        Args:
            concurrency: of trials at the start, for the sampler.
            milestones: samples seen at which trials are compared.
            earlier: trials of the folder that have ended.
            notify: called with notices for the user.
            num_slots: returns how many trials can run at the same time now; None: any number.
            most_trials: the search is of so many trials, the earlier ones included; None sets no
                end.
            pauses: given if trials pause at the milestones.

        Raises:
            UserError: the storage cannot be reached, or the study is of another space.
        """
        super().__init__(space.objective.metric, space.objective.mode)
        self._space = space
        self._concurrency = concurrency
        self._num_slots = num_slots
        self._switch = switch
        self._milestones = tuple(milestones)
        self._most_trials = most_trials
        self._pauses = pauses
        location = open_study(space, folder)
        self._is_alone = location.file is not None
        self.recorder = StudyRecorder(location, space, milestones, switch, notify)
        self._open: dict[str, OpenTrial] = {}  # by Tune's id
        self._paused: dict[int, OpenTrial] = {}  # by number
        self._without_state: set[int] = set()  # numbers of paused trials whose states are not kept
        self._to_run: deque[OpenTrial] = deque()
        self._history = build_history(space)
        self._run = RunConfigurations(space, earlier)
        self._next_number = self._resume(earlier)

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return Searcher, ()  # Tune pickles it to a file; the study's URL may have a password

    @property
    def study(self) -> optuna.Study:
        return self.recorder.study

    # ------------------------------------------------------------------ Tune's side

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return number and values of the next trial: one to resume, or else a new one.

        FINISHED if nothing is left to run; None if all slots are taken, the storage or a decision
        cannot be written, or while the outcome of a running trial may let another one run.
        """
        if self._num_slots is not None and len(self._open) >= self._num_slots():
            return None
        try:
            return self._suggest(trial_id)
        except OSError as error:  # of the rungs' log: the study's are waited for
            self._switch.fail(error)
            return None

    def _suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._to_run and (next_trial := self._next_trial()) is not None:
            self._to_run.append(next_trial)
        if not self._to_run:
            may_run_more = self._pauses is not None or self._run.num_left == 0
            if self._has_new_trials() or (may_run_more and self._open):
                return None
            if self._pauses is not None:  # nothing runs with which they could be compared
                self._end_paused(self._pauses, self._pauses.rungs.end_all())
            return self.FINISHED  # type: ignore[return-value]
        opened = self._open[trial_id] = self._to_run.popleft()
        return {NUMBER: opened.number, VALUES: opened.values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.recorder.patiently(lambda: self._report(self._open[trial_id], result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        opened = self._open.pop(trial_id, None)
        if opened is None or (result and UNFINISHED in result):
            return
        if self._pauses is not None and opened.number in self._pauses.rungs.paused and result:
            self._paused[opened.number] = opened
            self.recorder.patiently(lambda: self._report(opened, result))
            return
        has_ended = result and (result.get(IS_FINAL) or FAILURE in result)
        if self._switch.is_thrown() and not has_ended:
            return  # it ends because the search does; the records tell how
        if error or not result or (FAILURE in result and not result.get(INFEASIBLE)):
            self._run.fail(opened.values)
            self.recorder.patiently(lambda: self.recorder.end(opened, TrialState.FAIL))
        else:
            self.recorder.patiently(lambda: self._end(opened, result))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing of use: the study is in its storage, and Tune's state is not read again."""
        Path(checkpoint_path).touch()

    # ------------------------------------------------------------------ which trial is next

    def reason_to_end(self) -> str | None:
        """Return why there is no trial to run or to wait for, None if there is one."""
        is_busy = self._to_run or self._open or self._paused
        return None if is_busy else self._run.reason_to_end()

    def _next_trial(self) -> OpenTrial | None:
        """Return the trial that a free slot takes, None if there is none now."""
        if self._pauses is not None and (paused := self._promoted(self._pauses)) is not None:
            return paused
        self.recorder.patiently(self._take_in_other_searches)
        return self.recorder.patiently(self._ask) if self._has_new_trials() else None

    def _has_new_trials(self) -> bool:
        """Return whether a trial may begin."""
        if self._next_number == 0:
            return True  # the default configuration always runs
        is_over = self._most_trials is not None and self._next_number >= self._most_trials
        return not is_over and self._run.num_left != 0

    def _promoted(self, pauses: Pauses) -> OpenTrial | None:
        """Return the paused trial that goes on now, if there is one; end those without a chance,
        and drop the least promising states if there are too many."""
        # A report is decided on before Tune has ended the trial: until then its slot is not free.
        decision, ended, without_state = pauses.rungs.fill_slot(
            is_last=not self._has_new_trials(),
            most_trials=self._most_trials,
            max_states=pauses.max_states,
            arrived=self._paused,
        )
        if decision is not None:
            pauses.on_decision(decision)
            self._without_state.discard(decision.number)
        self._end_paused(pauses, ended)
        for number in without_state:
            if number in self._paused and number not in self._without_state:
                self._without_state.add(number)
                pauses.drop_state(number)
        return None if decision is None else self._paused.pop(decision.number)

    def _end_paused(self, pauses: Pauses, decisions: Iterable[PruningDecision]) -> None:
        for decision in decisions:
            pauses.on_decision(decision)
            opened = self._paused.pop(decision.number)
            self.recorder.patiently(lambda: self.recorder.end(opened, TrialState.PRUNED))  # noqa: B023

    def _ask(self) -> OpenTrial:
        number, errors = self._next_number, list[Exception]()
        self.study.sampler = build_sampler(
            self._space,
            self._concurrency,
            number,
            self._history,
            self._run.has_run,
            errors.append,
            self._milestones,
        )
        trial = self.recorder.create(number)
        values = suggest(self._space.parameters, trial)
        opened = self.recorder.begin(number, values, trial, errors)
        self._next_number += 1
        self._run.begin(values)
        return opened

    # ------------------------------------------------------------------ what the study holds

    def _report(self, opened: OpenTrial, result: dict[str, Any]) -> None:
        values = self._space.objective.values_in(result)
        self.recorder.report(opened, result[SAMPLES_SEEN], values, bool(result.get(IS_FINAL)))

    def _end(self, opened: OpenTrial, result: dict[str, Any]) -> None:
        """Write the end of a trial by its last result."""
        if FAILURE in result:
            self.recorder.end(opened, TrialState.PRUNED, is_infeasible=True)
            return
        self._report(opened, result)
        if result.get(IS_FINAL):
            self.recorder.end(opened, TrialState.COMPLETE, result[self.metric])
        else:
            self.recorder.end(opened, TrialState.PRUNED)

    def _resume(self, records: Sequence[TrialRecord]) -> int:
        """Bring the study in line with the ended trials, and resume the others; return the number
        of the next new trial.

        `trials.jsonl`, the study and the rungs are written one after the other, so after a kill
        any of them may know more; after a power loss the study may lack trials. A trial that never
        got its values becomes FAIL.
        """
        ours = self.recorder.resume()
        ended = {record.number for record in records}
        for record in records:
            if record.number not in ours:
                self.recorder.add(record)
        self.recorder.end_recorded(records)
        paused = {} if self._pauses is None else self._pauses.rungs.paused
        for number in sorted(ours.keys() - ended):
            opened = self.recorder.reopen(ours[number])
            if number in paused:
                self._paused[number] = opened
                last = paused[number]
                self.recorder.report(opened, last.samples_seen, last.values, is_final=False)
            else:
                self._to_run.append(opened)
            self._run.begin(opened.values)
        return 1 + max((*ours, *ended), default=-1)

    def _take_in_other_searches(self) -> None:
        """Count what other searches in the same database have run to the end as run."""
        if self._is_alone or not can_repeat(self._space.parameters):
            return
        for trial in self.study.get_trials(deepcopy=False, states=_COMPARED):
            if VALUES in trial.user_attrs and IMPORTED not in trial.user_attrs:
                self._run.begin(trial.user_attrs[VALUES])

    def end_recorded(self, records: Sequence[TrialRecord]) -> None:
        """Write the end of trials that Tune did not see end, such as at the end of the budget. If
        the storage is away then, --resume writes it."""
        self.recorder.patiently(lambda: self.recorder.end_recorded(records))

    def correlations(self) -> dict[str, float]:
        """Return how well earlier searches of other lengths predicted the values of trials: the
        last rank correlations that the sampler noted, by the names of the searches."""
        trials = self.recorder.patiently(lambda: self.study.get_trials(deepcopy=False)) or []
        noted = [t.system_attrs[CORRELATIONS] for t in trials if CORRELATIONS in t.system_attrs]
        return noted[-1] if noted else {}


def _raise(error: Exception) -> None:
    raise error


class RungScheduler(FIFOScheduler):
    """Lets the rungs decide: `asha`, `hyperband` and `pasha`.

    A trial that pauses ends for Tune, which hears of it again when it goes on (`StudySearch`).
    Tune's own classes lose their rungs when a search goes on after an interruption, keep the values
    of trials that failed later, and draw brackets that differ from run to run.
    """

    def __init__(
        self,
        rungs: SuccessiveHalving | PausingHalving,
        on_decision: OnDecision = lambda decision: None,
        on_failure: Callable[[Exception], None] = _raise,
    ) -> None:
        """
        Args:
            on_failure: called with why a decision could not be written; nothing is decided then.
                Tune would take the error for the trial's.
        """
        super().__init__()
        self._on_failure = on_failure
        self.rungs = rungs
        self._on_decision = on_decision

    def __reduce__(self) -> tuple[type[FIFOScheduler], tuple[()]]:
        return FIFOScheduler, ()  # Tune pickles it into a state that nobody reads

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        if FAILURE in result or UNFINISHED in result or result.get(IS_FINAL):
            return TrialScheduler.CONTINUE
        number, samples_seen = trial.config[NUMBER], result[SAMPLES_SEEN]
        try:
            values = self.rungs.objective.values_in(result)
            decision = self.rungs.decide(number, samples_seen, *values)
        except OSError as error:
            self._on_failure(error)
            return TrialScheduler.CONTINUE
        self._on_decision(decision)
        return TrialScheduler.CONTINUE if decision.goes_on else TrialScheduler.STOP

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        if FAILURE in result:
            self._withdraw(trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        if not trial.should_recover():  # else Tune begins it again, and it reports what it has
            self._withdraw(trial)

    def _withdraw(self, trial: Trial) -> None:
        try:
            self.rungs.withdraw(trial.config[NUMBER])
        except OSError as error:
            self._on_failure(error)
