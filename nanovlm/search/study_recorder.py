"""What is written of a search's trials to Optuna's study, and in which terms.

A trial has one trial of Optuna for life. One that the scheduler stopped is PRUNED there with its
values by samples seen, one that its own values made impossible is infeasible, any other failed one
is FAIL. One that waits at a milestone stays RUNNING, with the values that it has.

With several objectives the study is still one of the first: Optuna takes values at milestones, and
trials that were stopped with theirs, for one objective alone. The values of the others are in an
attribute, from which samplers (`Scalarized`) and the dashboard (`ReadOnlyStudy`) take them.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from nanovlm.cluster.relay import NUMBER, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import SearchSpace
from nanovlm.files import find_full_disk
from nanovlm.messages import TrialRecord, measured
from nanovlm.results.decisions import last_milestone
from nanovlm.samplers.configurations import distributions, encode
from nanovlm.samplers.history import CURVE, OTHERS, SOURCE, STORAGE_ERRORS
from nanovlm.samplers.optuna_compat import create_trial, reopen_trial, running_trial
from nanovlm.search.study import StorageAway, StudyLocation

logger = logging.getLogger(__name__)

T = TypeVar("T")

SEARCH = "search"
"""Attribute of Optuna's trials: the id of the search that runs it."""

IMPORTED = "imported"
"""Attribute of Optuna's trials: the results folder and the trial that it was taken from."""

SAMPLER_FAILURE = "sampler_failure"
"""Attribute of Optuna's trials: why the sampler failed, so that the trial was drawn at random."""

_LONGEST_REASON = 200
"""Characters."""

PATIENCE_SECONDS = 600.0
"""So long the storage may be away before the search ends."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0

_FEASIBLE = "feasible"
_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def patiently(
    do: Callable[[], T],
    switch: StopSwitch,
    notify: Callable[[str], None],
    explain: Callable[[Exception], str],
) -> T | None:
    """Return what `do` returns; try again while the storage is away, None if the search ends.

    Args:
        switch: ends the search; thrown if the storage stays away.
        notify: called where the storage fails.
        explain: returns the reason in words, without a password; may throw the switch.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = _FIRST_PAUSE
    while True:
        try:
            return do()
        except (StorageAway, *STORAGE_ERRORS) as error:
            reason = explain(error)
        if switch.is_thrown():
            return None
        text = f"the study's storage fails, trying again: {reason}"
        logger.warning("%s", text)
        if pause == _FIRST_PAUSE:
            notify(text)
        if time.monotonic() > deadline:
            switch.stop(f"study.storage: cannot be written: {reason}")
        switch.pause(pause)
        if switch.is_thrown():
            return None
        pause = min(_LONGEST_PAUSE, 2 * pause)


@dataclass
class OpenTrial:
    """A trial that has not ended."""

    number: int
    values: dict[str, Any]
    trial: optuna.Trial | None
    """None if it has ended in Optuna's study already, before the program was killed."""
    steps: set[int] = field(default_factory=set)
    """At which it has reported."""


@dataclass
class StudyRecorder:
    """Writes to Optuna's study of a search; its methods raise STORAGE_ERRORS, see `patiently`."""

    location: StudyLocation
    space: SearchSpace
    milestones: Sequence[int]
    switch: StopSwitch
    """Thrown if the storage stays away."""
    notify: Callable[[str], None]
    """Called where the storage fails, and with the first failure of the sampler."""

    def __post_init__(self) -> None:
        self.study = self.location.load()
        self._objective = self.space.objective
        self._sampler_failures: list[str | None] = []  # of each trial but the default one
        self._is_creating = False

    def patiently(self, do: Callable[[], T]) -> T | None:
        """Return what `do` returns; try again while the storage is away, None if the search ends.

        A full disk under the results folder ends it immediately: all else is written there, too.
        """

        def explain(error: Exception) -> str:
            if self.location.file is not None and find_full_disk(error):
                self.switch.fail(error)
            return self.location.without_password(str(error))

        return patiently(do, self.switch, self.notify, explain)

    def resume(self) -> dict[int, FrozenTrial]:
        """Return the trials of this search that got their values, by number; count the failures of
        the sampler among them."""
        ours = {
            trial.user_attrs[NUMBER]: trial
            for trial in self.study.get_trials(deepcopy=False)
            if self._is_ours(trial) and VALUES in trial.user_attrs
        }
        self._sampler_failures = [t.user_attrs.get(SAMPLER_FAILURE) for n, t in ours.items() if n]
        return ours

    def create(self, number: int) -> optuna.Trial:
        """Return the trial of a number: a new one, unless an attempt before this one wrote it. Of a
        database that is lost nobody knows whether it did what it never answered."""
        written = self._find(number) if self._is_creating else None
        self._is_creating = True
        if written is not None:
            return running_trial(self.study, written)
        return create_trial(self.study, {SEARCH: self.location.search_id, NUMBER: number})

    def _find(self, number: int) -> FrozenTrial | None:
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        ours = (t for t in running if self._is_ours(t) and t.user_attrs.get(NUMBER) == number)
        return next(ours, None)

    def begin(
        self,
        number: int,
        values: dict[str, Any],
        trial: optuna.Trial,
        errors: Sequence[Exception],
    ) -> OpenTrial:
        """Write the values of a trial that was created.

        Args:
            errors: of the sampler, each of which made it draw at random.
        """
        for error in errors[:1] if number > 0 else ():  # trial 0 is the default configuration
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:_LONGEST_REASON]
            trial.set_user_attr(SAMPLER_FAILURE, reason)
        trial.set_user_attr(VALUES, values)  # last: a trial that has them is whole
        self._is_creating = False  # from here on nothing is tried again
        if number > 0:
            self._count_sampler_failure(number, trial.user_attrs.get(SAMPLER_FAILURE))
        return OpenTrial(number, values, trial)

    def _count_sampler_failure(self, number: int, reason: str | None) -> None:
        if reason is not None and not any(self._sampler_failures):
            self.notify(
                f"the {self.space.sampler.name} sampler failed, and trial {number} is drawn at "
                f"random: {reason}; see logs/driver.log"
            )
        self._sampler_failures.append(reason)

    def sampler_note(self) -> str | None:
        """Return how often the sampler failed, None if it never did. If it always fails, the search
        is a random one."""
        reasons = [reason for reason in self._sampler_failures if reason is not None]
        if not reasons:
            return None
        return (
            f"the {self.space.sampler.name} sampler failed in {len(reasons)} of "
            f"{len(self._sampler_failures)} suggestions, which were random instead: {reasons[-1]}"
        )

    def reopen(self, trial: FrozenTrial) -> OpenTrial:
        """Open a trial again that has its values."""
        opened = None if trial.state.is_finished() else reopen_trial(self.study, trial)
        values, steps = dict(trial.user_attrs[VALUES]), set(trial.intermediate_values)
        return OpenTrial(trial.user_attrs[NUMBER], values, opened, steps)

    def report(
        self, opened: OpenTrial, samples_seen: int, values: Sequence[float], is_final: bool
    ) -> None:
        """Write the value of each objective of a trial, once for each milestone."""
        self._report_at(opened, self._step(samples_seen, is_final), values)

    def _report_at(self, opened: OpenTrial, step: int, values: Sequence[float]) -> None:
        if opened.trial is None or step in opened.steps:
            return
        value, *others = values
        if others:  # first: a step that has a value is whole
            known = opened.trial.user_attrs.get(OTHERS, {})
            opened.trial.set_user_attr(OTHERS, {**known, str(step): others})
        opened.trial.report(value, step=step)
        opened.steps.add(step)

    def end(
        self,
        opened: OpenTrial,
        state: TrialState,
        value: float | None = None,
        is_infeasible: bool = False,
    ) -> None:
        """Write how a trial has ended.

        Args:
            value: of the first objective, if it is COMPLETE.
        """
        if opened.trial is None:
            return
        if is_infeasible and _FEASIBLE not in opened.trial.constraints:
            opened.trial.set_constraint(_FEASIBLE, 1.0)
        self._end(opened.trial.number, state, value)

    def end_recorded(self, records: Sequence[TrialRecord]) -> None:
        """Write the end of trials that are open in the study. Others stay open, unless they never
        got their values: those become FAIL."""
        ended = {record.number: record for record in records}
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not self._is_ours(trial):
                continue
            if VALUES not in trial.user_attrs:
                self._end(trial.number, TrialState.FAIL)
            elif record := ended.get(trial.user_attrs[NUMBER]):
                self._end_recorded(self.reopen(trial), record)

    def _end_recorded(self, opened: OpenTrial, record: TrialRecord) -> None:
        state, value = _STATES[record.state], None
        if state is not TrialState.FAIL:
            for step, values in self._curve(record).items():
                self._report_at(opened, step, values)
        if state is TrialState.COMPLETE:
            value = record.metrics[self._objective.metric]
        if record.is_infeasible:
            state = TrialState.PRUNED
        self.end(opened, state, value, record.is_infeasible)

    def add(self, record: TrialRecord) -> None:
        """Add an ended trial of this search that the study does not know."""
        self._add(record, {SEARCH: self.location.search_id, NUMBER: record.number})

    def add_imported(
        self, record: TrialRecord, source: str, is_full: bool, shares: Sequence[float] | None = None
    ) -> None:
        """Add a trial of another search, unless it is there.

        Args:
            source: the results folder that it is from.
            is_full: whether it ran as long as a full trial does here.
            shares: of a search of another length, how far the trial had come there at each of its
                reports, 1 in full.
        """
        name = f"{source}: {record.trial_id}"
        if name in (t.user_attrs.get(IMPORTED) for t in self.study.get_trials(deepcopy=False)):
            return
        attributes: dict[str, Any] = {IMPORTED: name}
        if shares is not None:
            rows = [self._objective.values_in(measured(report)) for report in record.reports]
            curve = [(share, *row) for share, row in zip(shares, rows, strict=True)]
            attributes |= {SOURCE: source, CURVE: curve}
        self._add(record, attributes, is_full)

    # ------------------------------------------------------------------ inside

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return trial.user_attrs.get(SEARCH) == self.location.search_id

    def _end(self, number: int, state: TrialState, value: float | None = None) -> None:
        """End a trial by Optuna's own number."""
        self.study.tell(number, value, state=state, skip_if_finished=True)
        if self.location.file is not None:
            self.location.file.sync()

    def _step(self, samples_seen: int, is_final: bool) -> int:
        """Return the milestone of a report.

        A report is made at the first step that reaches its milestone, which depends on the batch
        size. Samplers compare trials by how far they came, so batches must make no difference.
        """
        if is_final:
            return samples_seen
        return last_milestone(self.milestones, samples_seen) or samples_seen

    def _curve(self, record: TrialRecord) -> dict[int, tuple[float, ...]]:
        """Return a trial's values by milestone."""
        is_full = record.state == "completed"
        return {
            self._step(report.samples_seen, is_full and report is record.reports[-1]): (
                self._objective.values_in(measured(report))
            )
            for report in record.reports
        }

    def _add(
        self, record: TrialRecord, attributes: Mapping[str, Any], is_full: bool = True
    ) -> None:
        """Add an ended trial.

        Args:
            is_full: whether a trial that ran its full budget counts for one here.
        """
        curve = self._curve(record)
        state = _STATES[record.state]
        if record.is_infeasible or (state is TrialState.COMPLETE and not is_full):
            state = TrialState.PRUNED
        has_value = state is not TrialState.FAIL and bool(curve)
        ours = distributions(self.space.parameters)
        params = encode(self.space.parameters, record.parameters)
        others = {str(step): row[1:] for step, row in curve.items() if row[1:]}
        known = {VALUES: dict(record.parameters), **attributes}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=curve[max(curve)][0] if has_value else None,
                params=params,
                distributions={key: ours[key] for key in params},
                intermediate_values={step: row[0] for step, row in curve.items()},
                user_attrs=known | {OTHERS: others} if others else known,
                constraints={_FEASIBLE: 1.0} if record.is_infeasible else None,
            )
        )
