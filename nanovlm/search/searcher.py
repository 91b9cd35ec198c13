"""Where trials come from: Optuna, through Tune's `OptunaSearch`, told what really happened.

Tune's own class tells every trial that the scheduler stopped as COMPLETE, one that ran out of
memory FAIL, which samplers overlook, and one without a number never. Here a stopped trial is told
PRUNED with its values by samples seen, one that its own values made impossible is told infeasible,
any other failed one FAIL, and none stays RUNNING. A trial has one trial of Optuna for life: when a
search goes on after an interruption, those under way are taken up again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from nanovlm.distributed.session import StopSwitch
from nanovlm.distributed.trainable import (
    FAILURE,
    INFEASIBLE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    UNFINISHED,
    VALUES,
)
from nanovlm.messages import TrialRecord
from nanovlm.search.configurations import RunConfigurations, can_repeat
from nanovlm.search.patience import patiently
from nanovlm.search.sampler_failures import SamplerFailures
from nanovlm.search.samplers import build_history, build_sampler, distributions, encode, suggest
from nanovlm.search.space import SearchSpace
from nanovlm.search.study import StudyFileStorage, StudyPlace, open_study

T = TypeVar("T")

SEARCH = "search"
"""Attribute of Optuna's trials: the id of the search that runs it."""

IMPORTED = "imported"
"""Attribute of Optuna's trials: the results folder and the trial that it was taken from."""

_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}

_JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)


def build_searcher(
    space: SearchSpace,
    folder: Path,
    concurrency: int,
    switch: StopSwitch,
    milestones: Sequence[int] = (),
    earlier: Sequence[TrialRecord] = (),
    failures: SamplerFailures | None = None,
) -> "StudySearch":
    """Return the searcher of a space; the study of its results folder is gone on with.

    Args:
        milestones: samples seen at which trials are compared.
        earlier: trials of the folder that have ended.
        failures: counts those of the sampler, and tells a person what goes wrong.

    Raises:
        UserError: the storage cannot be reached, or the study is of another space.
    """
    searcher = StudySearch(
        space, open_study(space, folder), concurrency, switch, milestones, failures
    )
    searcher.take_up(earlier)
    return searcher


@dataclass
class _OpenTrial:
    """A trial that Tune runs."""

    number: int
    values: dict[str, Any]
    trial: optuna.Trial | None
    """None if Optuna was told of its end already, before the program was killed."""
    steps: set[int] = field(default_factory=set)
    """At which it has reported."""


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
        self._failures = failures or SamplerFailures()
        self._failures.sampler = space.sampler.name
        self._open: dict[str, _OpenTrial] = {}
        self._to_run: deque[_OpenTrial] = deque()
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
        return None if self._to_run or self._open else self._run.reason_to_end()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return number and values of the next trial.

        FINISHED if all configurations have run; None if the storage cannot be written, or as long
        as a trial runs whose failure would let its configuration run again.
        """
        if not self._to_run:
            self._patiently(self._take_in_other_searches)
            if self._run.num_left == 0 and self._next_number > 0:  # the default one always runs
                return None if self._open else self.FINISHED  # type: ignore[return-value]
            trial = self._patiently(self._ask)
            if trial is None:
                return None
            self._to_run.append(trial)
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
        has_ended = result and (result.get(IS_FINAL) or FAILURE in result)
        if self._switch.is_thrown() and not has_ended:
            return  # it ends because the search does; the records tell how
        judged = None if error else _judged(result)
        if judged is None:
            self._run.fail(opened.values)
        self._patiently(lambda: self._tell(opened, judged))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing of use: the study is in its storage, and Tune's state is not read again."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    # ------------------------------------------------------------------ what Optuna is told

    def _ask(self) -> _OpenTrial:
        number, errors = self._next_number, list[Exception]()
        self.study.sampler = build_sampler(
            self._search_space,
            self._concurrency,
            number,
            self._history,
            self._run.has_run,
            errors.append,
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
        return _OpenTrial(number, values, trial)

    def _report(self, opened: _OpenTrial, result: Mapping[str, Any]) -> None:
        step = self._step(result[SAMPLES_SEEN], bool(result.get(IS_FINAL)))
        if opened.trial is not None and step not in opened.steps:
            opened.trial.report(result[self.metric], step=step)
            opened.steps.add(step)

    def _tell(self, opened: _OpenTrial, result: dict[str, Any] | None) -> None:
        trial = opened.trial
        if trial is None:
            return
        if result is None:
            self._finish(trial, TrialState.FAIL)
        elif FAILURE in result:
            self._tell_infeasible(trial)
        else:
            self._report(opened, result)
            is_full = bool(result.get(IS_FINAL))
            state = TrialState.COMPLETE if is_full else TrialState.PRUNED
            self._finish(trial, state, result[self.metric] if is_full else None)

    def _tell_infeasible(self, trial: optuna.Trial) -> None:
        if not trial.storage.get_trial(trial._trial_id).constraints:
            trial.set_constraint("feasible", 1.0)
        self._finish(trial, TrialState.PRUNED)

    def _finish(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        self.study.tell(trial, value, state=state, skip_if_finished=True)
        if isinstance(self._place.storage, StudyFileStorage):
            self._place.storage.file.sync()

    def _step(self, samples_seen: int, is_final: bool) -> int:
        """Return the milestone of a report.

        A report is made at the first step that reaches its milestone, which depends on the batch
        size. Samplers compare trials by how far they came, so batches must make no difference.
        """
        if is_final:
            return samples_seen
        reached = [milestone for milestone in self._milestones if milestone <= samples_seen]
        return reached[-1] if reached else samples_seen

    # ------------------------------------------------------------------ what was before

    def take_up(self, records: Sequence[TrialRecord]) -> None:
        """Bring the study in line with the trials that have ended; go on with those under way.

        `trials.jsonl` and the study are written one after the other, so after a kill either may
        know more; after a power loss the study may lack trials. A trial that never got its values
        is told FAIL.
        """
        ours = {
            trial.user_attrs[NUMBER]: trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.user_attrs.get(SEARCH) == self._place.search_id and VALUES in trial.user_attrs
        }
        for number, frozen in ours.items():
            if number > 0:
                self._failures.restore(frozen)
        ended = {record.number: record for record in records}
        for number, record in ended.items():
            if number not in ours:
                self._import(record, {SEARCH: self._place.search_id, NUMBER: number})
        self._tell_ended(records)
        self._run = RunConfigurations(self._search_space, records)
        for number in sorted(ours.keys() - ended.keys()):
            trial = ours[number]
            is_told = trial.state.is_finished()
            reopened = None if is_told else self._reopen(trial)
            steps = set(trial.intermediate_values)
            values = dict(trial.user_attrs[VALUES])
            self._to_run.append(_OpenTrial(number, values, reopened, steps))
            self._run.begin(values)
        self._next_number = 1 + max((*ours, *ended), default=-1)

    def _take_in_other_searches(self) -> None:
        """Take note of what other searches in the same database have run to the end."""
        is_ours_alone = isinstance(self._place.storage, StudyFileStorage)
        if is_ours_alone or not can_repeat(self._search_space.parameters):
            return
        for trial in self.study.get_trials(deepcopy=False, states=_JUDGED):
            if VALUES in trial.user_attrs and IMPORTED not in trial.user_attrs:
                self._run.begin(trial.user_attrs[VALUES])

    def tell_ended(self, records: Iterable[TrialRecord]) -> None:
        """Tell Optuna of trials that have ended, but not through Tune, such as at the end of the
        budget. If the storage is away when the search ends, `take_up` tells it with --resume."""
        self._patiently(lambda: self._tell_ended(records))

    def _tell_ended(self, records: Iterable[TrialRecord]) -> None:
        """Tell Optuna of trials that have ended. Others that run stay open, unless they never got
        their values."""
        ended = {record.number: record for record in records}
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get(SEARCH) != self._place.search_id:
                continue
            if VALUES not in trial.user_attrs:
                self._finish(self._reopen(trial), TrialState.FAIL)
            elif record := ended.get(trial.user_attrs[NUMBER]):
                self._tell_record(self._reopen(trial), record, set(trial.intermediate_values))

    def _tell_record(self, trial: optuna.Trial, record: TrialRecord, steps: set[int]) -> None:
        if record.state == "failed":
            if record.is_infeasible:
                self._tell_infeasible(trial)
            else:
                self._finish(trial, TrialState.FAIL)
            return
        for step, value in self._curve(record).items():
            if step not in steps:
                trial.report(value, step=step)
        is_full = record.state == "completed"
        self._finish(trial, _STATES[record.state], record.metrics[self.metric] if is_full else None)

    def _curve(self, record: TrialRecord) -> dict[int, float]:
        """Return a trial's values by milestone."""
        last = len(record.reports) - 1
        return {
            self._step(report.samples_seen, record.state == "completed" and place == last): (
                report.metrics[self.metric]
            )
            for place, report in enumerate(record.reports)
        }

    def _reopen(self, trial: FrozenTrial) -> optuna.Trial:
        self.study.sampler = optuna.samplers.RandomSampler()  # draws nothing: all is drawn
        return optuna.trial.Trial(self.study, trial._trial_id)

    def _import(
        self, record: TrialRecord, attributes: Mapping[str, Any], is_full: bool = True
    ) -> None:
        """Add an ended trial that the study does not know.

        Args:
            is_full: whether a trial that ran its full budget counts for one here.
        """
        curve = self._curve(record)
        state = _STATES[record.state]
        if record.is_infeasible or (state is TrialState.COMPLETE and not is_full):
            state = TrialState.PRUNED
        told = state is not TrialState.FAIL and bool(curve)
        ours = distributions(self._search_space.parameters)
        params = encode(self._search_space.parameters, record.parameters)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=curve[max(curve)] if told else None,
                params=params,
                distributions={key: ours[key] for key in params},
                intermediate_values=curve,
                user_attrs={VALUES: dict(record.parameters), **attributes},
                constraints={"feasible": 1.0} if record.is_infeasible else None,
            )
        )

    def import_trial(self, record: TrialRecord, source: str, is_full: bool) -> bool:
        """Let the sampler learn from a trial of another search; return whether it was new.

        Args:
            source: the results folder that it is from.
            is_full: whether it ran as long as a full trial does here.
        """
        name = f"{source}: {record.trial_id}"
        known = (t.user_attrs.get(IMPORTED) for t in self.study.get_trials(deepcopy=False))
        if name in known:
            return False
        self._import(record, {IMPORTED: name}, is_full)
        return True

    def _patiently(self, do: Callable[[], T]) -> T | None:
        return patiently(do, self._place, self._switch, self._failures.tell)


def _judged(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a trial's last result, None if it failed for no fault of its values."""
    if not result or (FAILURE in result and not result.get(INFEASIBLE)):
        return None
    return result
