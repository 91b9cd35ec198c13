"""What Optuna's study is told of a search's trials, and in which words.

A trial has one trial of Optuna for life. One that the scheduler stopped is told PRUNED with its
values by samples seen, one that its own values made impossible is told infeasible, any other failed
one FAIL. One that waits at a milestone stays RUNNING, with its values so far.

With several objectives the study is still one of the first: Optuna takes values at milestones, and
trials that were stopped with theirs, for one objective alone. The values of the others are in an
attribute, from which samplers (`scalarized.py`) and the dashboard (`shown_study.py`) take them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nanovlm.cluster.relay import NUMBER, VALUES
from nanovlm.config.space import SearchSpace
from nanovlm.messages import TrialRecord, measured
from nanovlm.results.decisions import last_milestone
from nanovlm.samplers.milestone_sampler import CURVE, SOURCE
from nanovlm.samplers.optuna_samplers import distributions, encode
from nanovlm.samplers.scalarized import OTHERS
from nanovlm.search.study import StudyFileStorage, StudyPlace

SEARCH = "search"
"""Attribute of Optuna's trials: the id of the search that runs it."""

IMPORTED = "imported"
"""Attribute of Optuna's trials: the results folder and the trial that it was taken from."""

_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass
class OpenTrial:
    """A trial that has not ended."""

    number: int
    values: dict[str, Any]
    trial: optuna.Trial | None
    """None if Optuna was told of its end already, before the program was killed."""
    steps: set[int] = field(default_factory=set)
    """At which it has reported."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """Its attribute OTHERS, if there are several objectives."""


class ToldStudy:
    """Optuna's study of a search."""

    def __init__(
        self,
        study: optuna.Study,
        place: StudyPlace,
        space: SearchSpace,
        milestones: Sequence[int],
    ) -> None:
        self.study = study
        self._place = place
        self._space = space
        self._objective = space.objective
        self._milestones = tuple(milestones)

    def ours(self) -> dict[int, FrozenTrial]:
        """Return the trials of this search that got their values, by number."""
        return {
            trial.user_attrs[NUMBER]: trial
            for trial in self.study.get_trials(deepcopy=False)
            if self._is_ours(trial) and VALUES in trial.user_attrs
        }

    def report(
        self, opened: OpenTrial, samples_seen: int, values: Sequence[float], is_final: bool
    ) -> None:
        """Tell the value of each objective of a trial, once for each milestone."""
        self._report_at(opened, self._step(samples_seen, is_final), values)

    def _report_at(self, opened: OpenTrial, step: int, values: Sequence[float]) -> None:
        if opened.trial is None or step in opened.steps:
            return
        value, *others = values
        if others:  # first: a step that has a value is whole
            opened.others[str(step)] = others
            opened.trial.set_user_attr(OTHERS, opened.others)
        opened.trial.report(value, step=step)
        opened.steps.add(step)

    def complete(self, opened: OpenTrial, value: float) -> None:
        self._finish(opened.trial, TrialState.COMPLETE, value)

    def prune(self, opened: OpenTrial) -> None:
        self._finish(opened.trial, TrialState.PRUNED)

    def fail(self, opened: OpenTrial) -> None:
        self._finish(opened.trial, TrialState.FAIL)

    def set_infeasible(self, opened: OpenTrial) -> None:
        trial = opened.trial
        if trial is not None and not trial.storage.get_trial(trial._trial_id).constraints:
            trial.set_constraint("feasible", 1.0)
        self._finish(trial, TrialState.PRUNED)

    def reopen(self, trial: FrozenTrial) -> OpenTrial:
        """Take up a trial that has its values."""
        opened = None if trial.state.is_finished() else self._trial_of(trial)
        values, steps = dict(trial.user_attrs[VALUES]), set(trial.intermediate_values)
        others = dict(trial.user_attrs.get(OTHERS, {}))
        return OpenTrial(trial.user_attrs[NUMBER], values, opened, steps, others)

    def tell_ended(self, records: Sequence[TrialRecord]) -> None:
        """Tell Optuna of trials that have ended. Others stay open, unless they never got their
        values."""
        ended = {record.number: record for record in records}
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not self._is_ours(trial):
                continue
            if VALUES not in trial.user_attrs:
                self._finish(self._trial_of(trial), TrialState.FAIL)
            elif record := ended.get(trial.user_attrs[NUMBER]):
                self._tell_record(self.reopen(trial), record)

    def add(self, record: TrialRecord) -> None:
        """Add an ended trial of this search that the study does not know."""
        self._add(record, {SEARCH: self._place.search_id, NUMBER: record.number})

    def add_imported(
        self, record: TrialRecord, source: str, is_full: bool, shares: Sequence[float] | None = None
    ) -> bool:
        """Add a trial of another search; return whether it was new.

        Args:
            source: the results folder that it is from.
            is_full: whether it ran as long as a full trial does here.
            shares: of a search of another length, how far the trial had come there at each of its
                reports, 1 in full.
        """
        name = f"{source}: {record.trial_id}"
        known = (t.user_attrs.get(IMPORTED) for t in self.study.get_trials(deepcopy=False))
        if name in known:
            return False
        attributes: dict[str, Any] = {IMPORTED: name}
        if shares is not None:
            rows = [self._objective.values_in(measured(report)) for report in record.reports]
            curve = [(share, *row) for share, row in zip(shares, rows, strict=True)]
            attributes |= {SOURCE: source, CURVE: curve}
        self._add(record, attributes, is_full)
        return True

    # ------------------------------------------------------------------ inside

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return trial.user_attrs.get(SEARCH) == self._place.search_id

    def _trial_of(self, trial: FrozenTrial) -> optuna.Trial:
        self.study.sampler = optuna.samplers.RandomSampler()  # draws nothing: all is drawn
        return optuna.trial.Trial(self.study, trial._trial_id)

    def _finish(
        self, trial: optuna.Trial | None, state: TrialState, value: float | None = None
    ) -> None:
        if trial is None:
            return
        self.study.tell(trial, value, state=state, skip_if_finished=True)
        if isinstance(self._place.storage, StudyFileStorage):
            self._place.storage.file.sync()

    def _tell_record(self, opened: OpenTrial, record: TrialRecord) -> None:
        if record.is_infeasible:
            self.set_infeasible(opened)
        elif record.state == "failed":
            self.fail(opened)
        else:
            for step, values in self._curve(record).items():
                self._report_at(opened, step, values)
            if record.state == "completed":
                self.complete(opened, record.metrics[self._objective.metric])
            else:
                self.prune(opened)

    def _step(self, samples_seen: int, is_final: bool) -> int:
        """Return the milestone of a report.

        A report is made at the first step that reaches its milestone, which depends on the batch
        size. Samplers compare trials by how far they came, so batches must make no difference.
        """
        if is_final:
            return samples_seen
        return last_milestone(self._milestones, samples_seen) or samples_seen

    def _curve(self, record: TrialRecord) -> dict[int, tuple[float, ...]]:
        """Return a trial's values by milestone."""
        last = len(record.reports) - 1
        return {
            self._step(report.samples_seen, record.state == "completed" and place == last): (
                self._objective.values_in(measured(report))
            )
            for place, report in enumerate(record.reports)
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
        told = state is not TrialState.FAIL and bool(curve)
        ours = distributions(self._space.parameters)
        params = encode(self._space.parameters, record.parameters)
        others = {str(step): row[1:] for step, row in curve.items() if row[1:]}
        known = {
            VALUES: dict(record.parameters),
            **attributes,
            **({OTHERS: others} if others else {}),
        }
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=curve[max(curve)][0] if told else None,
                params=params,
                distributions={key: ours[key] for key in params},
                intermediate_values={step: row[0] for step, row in curve.items()},
                user_attrs=known,
                constraints={"feasible": 1.0} if record.is_infeasible else None,
            )
        )
