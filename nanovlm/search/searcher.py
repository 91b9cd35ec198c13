"""Where trials come from: Optuna, through Tune's `OptunaSearch`, told what really happened.

Tune's own class tells every trial that the scheduler stopped as COMPLETE, and a trial without a
number never. Here a stopped trial is told PRUNED with its values by samples seen, a failed one
FAIL, and none stays RUNNING.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from nanovlm.distributed.session import StopSwitch
from nanovlm.distributed.trainable import (
    FAILURE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    UNFINISHED,
    VALUES,
)
from nanovlm.messages import TrialRecord
from nanovlm.search.parameter import Parameter
from nanovlm.search.space import SearchSpace

STUDY_FILE = "study.journal"
STUDY_NAME = "search"

_OPTUNA_STATES = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def build_searcher(
    space: SearchSpace,
    folder: Path,
    concurrency: int,
    switch: StopSwitch,
    earlier: Sequence[TrialRecord] = (),
) -> "StudySearch":
    """Return the searcher of a space; its study lives in the results folder and is gone on with.

    Trials that an earlier run left unfinished are told FAIL, and their values come first again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = StudySearch(
        space=functools.partial(_suggest_all, space.parameters),
        metric=space.objective.metric,
        mode=space.objective.mode,
        study_name=STUDY_NAME,
        storage=JournalStorage(JournalFileBackend(str(folder / STUDY_FILE))),
    )
    searcher.make_sampler = functools.partial(_sampler, space, concurrency)
    searcher.switch = switch
    study = searcher.study
    if not study.trials:
        study.enqueue_trial(space.default_values(), user_attrs={NUMBER: 0})
    searcher.tell_ended(earlier)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
    return searcher


class StudySearch(OptunaSearch):
    """OptunaSearch that numbers its suggestions and tells Optuna how each trial ended.

    The number is an attribute of Optuna's trial and not Optuna's own, so that a trial which is run
    again after an interruption keeps it.
    """

    make_sampler: Callable[[int], BaseSampler]
    """From the number of the trial. A sampler of its own for each trial, seeded by its number,
    makes a search that was interrupted suggest what the undisturbed one would have."""

    switch: StopSwitch
    """Tells whether a trial ends because the search does; it stays RUNNING then, so that the search
    knows what to begin with when it goes on."""

    @property
    def study(self) -> optuna.Study:
        assert self._ot_study is not None, "the space was given, so the study is there"
        return self._ot_study

    def suggest(self, trial_id: str) -> dict[str, Any]:
        numbers = [t.user_attrs.get(NUMBER, -1) for t in self.study.get_trials(deepcopy=False)]
        next_number = 1 + max(numbers, default=-1)
        self.study.sampler = self.make_sampler(next_number)
        values = super().suggest(trial_id)
        trial = self._ot_trials[trial_id]
        if NUMBER not in trial.user_attrs:
            trial.set_user_attr(NUMBER, next_number)
        return {NUMBER: trial.user_attrs[NUMBER], VALUES: values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._ot_trials[trial_id].report(result[self.metric], step=result[SAMPLES_SEEN])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._ot_trials.pop(trial_id)
        if self.switch.is_thrown() or (result and UNFINISHED in result):
            return
        if error or not result or FAILURE in result:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        value = result[self.metric]
        trial.report(value, step=result[SAMPLES_SEEN])
        if result.get(IS_FINAL):
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def tell_ended(self, records: Iterable[TrialRecord]) -> None:
        """Tell Optuna of trials that have ended, but not through Tune: at the end of the budget, or
        because the program was killed in between. Others that run stay open."""
        ended = {record.number: record for record in records}
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            record = ended.get(trial.user_attrs.get(NUMBER, -1))
            if record is not None:
                state = _OPTUNA_STATES[record.state]
                value = record.metrics[self.metric] if state is TrialState.COMPLETE else None
                self.study.tell(trial.number, value, state=state)


def _sampler(space: SearchSpace, concurrency: int, number: int) -> BaseSampler:
    seed = hash((space.sampler.seed, number)) % 2**32  # of integers: the same in every process
    if space.sampler.name == "random":
        return RandomSampler(seed=seed)
    # Random trials until the model has something to learn from; while `concurrency` of them are
    # still running they teach nothing.
    return TPESampler(seed=seed, n_startup_trials=10 + concurrency - 1)


def _suggest_all(parameters: Sequence[Parameter], trial: optuna.Trial) -> None:
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.is_active(values):
            values[parameter.key] = _suggest(trial, parameter)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    key, values = parameter.key, parameter.values
    if parameter.kind == "choice":
        return trial.suggest_categorical(key, values)
    log = parameter.kind.startswith("log_")
    low, high = values
    if parameter.kind.endswith("int"):
        return trial.suggest_int(key, low, high, log=log)  # type: ignore[arg-type]
    return trial.suggest_float(key, low, high, log=log)  # type: ignore[arg-type]
