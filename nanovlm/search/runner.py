"""Runs a search: Optuna suggests, Tune and ASHA decide, the worker groups train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from nanovlm.data.build import OnProgress, log_progress
from nanovlm.data.sources import pin_data
from nanovlm.distributed.session import INTERRUPTED, OnRecord, OnStart, Session, StopSwitch, session
from nanovlm.distributed.trainable import TrialRelay
from nanovlm.distributed.worker import RunTrial
from nanovlm.errors import Problems, UserError, did_you_mean
from nanovlm.messages import TrialRecord
from nanovlm.resources import Resources
from nanovlm.search.limits import Limits, hours_reason
from nanovlm.search.scheduler import (
    RungScheduler,
    Scheduler,
    build_scheduler,
    plan_milestones,
)
from nanovlm.search.searcher import StudySearch, build_searcher
from nanovlm.search.sections import Objective
from nanovlm.search.space import SearchSpace
from nanovlm.search.study import open_study
from nanovlm.trial import check_backbones, check_start, metric_names, run_trial

__all__ = ["INTERRUPTED", "Limits", "SearchPlan", "plan_search", "run_search"]

_LESS_IS_BETTER = ("_loss", "_nll")
_MORE_IS_BETTER = ("_accuracy",)
"""How the metrics' names end that can be objectives; the parts of an accuracy have a `/`."""

_UNLIMITED_TRIALS = -1
"""Tune's word for a search that something else ends."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search was made up to be, before it starts."""

    space: SearchSpace
    """With the version of each data set of the hub."""
    milestones: tuple[int, ...]
    """Samples seen at which trials report and are compared, before the end."""
    trial_samples: int
    """Samples that a trial of full length sees, at most."""
    data: Mapping[str, Any]
    """What the data was made from and what was left out of it; JSON."""

    def describe(self) -> str:
        """Return the plan in one line."""
        at = ", ".join(str(milestone) for milestone in self.milestones)
        compared = f", compared at {at}" if at else ""
        return f"{self.space.name}: trials of {self.trial_samples} samples{compared}"


def plan_search(space: SearchSpace, on_progress: OnProgress = log_progress) -> SearchPlan:
    """Return the plan of a search; prepares the data, since the milestones follow from its size.

    Args:
        on_progress: told how far it is when data has to be prepared.

    Raises:
        UserError: if the data cannot be had, is smaller than a batch or too small for the rungs, or
            if no report will carry the objective.
    """
    resources = Resources("cpu", on_progress)
    check_start(space.base)
    check_backbones(space.base)
    resources.tokenizer(space.base.vlm.lm_tokenizer)
    space = replace(space, base=pin_data(space.base))
    config = replace(space.base, batch_size=space.batch_sizes()[1])
    train_samples, _ = resources.training_data(config)
    _check_objective(space.objective, metric_names(config, resources))
    budget = config.epochs * len(train_samples)
    return SearchPlan(
        space, plan_milestones(space, budget), budget, resources.describe_data(config)
    )


def _check_objective(objective: Objective, metrics: Sequence[str]) -> None:
    """Raise if no report will carry the objective, or if its mode looks for the worst trial."""
    metric = objective.metric
    scores = (*_LESS_IS_BETTER, *_MORE_IS_BETTER)
    usable = [name for name in metrics if name.endswith(scores) or "/" in name]
    if metric not in usable:
        raise UserError(
            f"objective.metric: no report has {metric!r} as a score.{did_you_mean(metric, usable)}"
        )
    better = "min" if metric.endswith(_LESS_IS_BETTER) else "max"
    if objective.mode != better:
        raise UserError(f"objective.mode: must be {better!r} for {metric}, got {objective.mode!r}")


def run_search(
    plan: SearchPlan,
    folder: Path,
    *,
    address: str | None = None,
    concurrency: int | None = None,
    earlier: Sequence[TrialRecord] = (),
    earlier_seconds: float = 0.0,
    on_start: OnStart,
    on_record: OnRecord,
    run_trial: RunTrial = run_trial,
) -> str:
    """Run the search of `plan`; return why it ended (`INTERRUPTED`: by a signal).

    Args:
        folder: the results folder; `on_start` makes it.
        address: of a Ray cluster to join; None starts one here and ends it afterwards.
        concurrency: trials at once; None takes what fits on the cluster.
        earlier: trials that ended before the search was interrupted; they count for the budget and
            for what later trials are compared with.
        earlier_seconds: how long the search ran before that.
        run_trial: what the workers run for each trial.

    Raises:
        UserError: the cluster cannot run the trials, the study cannot be used, or no report has the
            objective.
    """
    space, folder = plan.space, folder.resolve()
    open_study(space, folder)  # before Ray takes its time
    switch = StopSwitch(space.budget.seconds_left(earlier_seconds), hours_reason(space.budget))
    scheduler = build_scheduler(space, plan.milestones, folder)
    limits, ended = Limits(space, switch, folder / "logs"), list[TrialRecord]()
    limits.replay(earlier)
    problems = Problems()
    num_trials = space.budget.trials and space.budget.trials - len(earlier)
    if num_trials is not None and num_trials <= 0:
        return f"{len(earlier)} trials done"

    def handle(record: TrialRecord) -> None:
        record = _with_reason(record, scheduler)
        with problems:
            _check_reported(space.objective, record)
        if problems.messages:
            switch.stop(problems.messages[0])
            return
        if record.state == "stopped" and record.reason is None:
            return  # nobody decided that: Tune broke down and took its trials along
        if record.state != "running":
            ended.append(record)
        on_record(record)
        limits.check(record)

    with session(
        address,
        space.resources,
        num_slots=concurrency,
        max_slots=num_trials,
        folder=folder,
        switch=switch,
        on_start=on_start,
        on_record=handle,
        run_trial=run_trial,
    ) as running:
        searcher = build_searcher(
            space, folder, running.num_slots, switch, plan.milestones, earlier
        )
        _tune(plan, folder, running, searcher, scheduler, switch, num_trials)
    problems.raise_if_any()
    searcher.tell_ended(ended)
    return switch.reason or f"{space.budget.trials} trials done"


def _tune(
    plan: SearchPlan,
    folder: Path,
    running: Session,
    searcher: StudySearch,
    scheduler: Scheduler,
    switch: StopSwitch,
    num_trials: int | None,
) -> None:
    """Let Ray Tune run `num_trials` trials; returns after them or when the switch is thrown."""
    trainable = tune.with_parameters(
        TrialRelay,
        channel=running.channel,
        space=plan.space,
        milestones=plan.milestones,
        folder=folder,
    )
    tuner = tune.Tuner(
        # Tune wants every trial to ask for something; this takes nothing from the workers.
        tune.with_resources(trainable, {"node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            num_samples=num_trials or _UNLIMITED_TRIALS,
            search_alg=searcher,
            scheduler=scheduler,
            max_concurrent_trials=running.num_slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder / "logs" / "ray"),
            stop=_StopperOf(switch),
            verbose=0,
        ),
    )
    tuner.fit()


class _StopperOf(tune.Stopper):
    """Ends the experiment when the switch is thrown."""

    def __init__(self, switch: StopSwitch) -> None:
        self._switch = switch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._switch.is_thrown()


def _check_reported(objective: Objective, record: TrialRecord) -> None:
    """Raise if a trial's report has not the objective."""
    if record.reports and objective.metric not in record.metrics:
        raise UserError(
            f"objective.metric: the reports of {record.trial_id} have no {objective.metric!r}."
            f"{did_you_mean(objective.metric, record.metrics)}"
        )


def _with_reason(record: TrialRecord, scheduler: Scheduler) -> TrialRecord:
    """Return the record of a stopped trial with the scheduler's reason."""
    if record.state != "stopped" or record.reason or not isinstance(scheduler, RungScheduler):
        return record
    return replace(record, reason=scheduler.rungs.reason(record.number))
