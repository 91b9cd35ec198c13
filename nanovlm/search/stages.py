"""The two stages of a search: Optuna suggests, Tune and the rungs decide, worker groups train.

In the first one trials run until a limit of the budget is reached; in the second one the best
configurations race each other and the default one on fresh seeds, which decides between them. Both
can be interrupted and gone on with.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray import tune

from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.relay import TrialRelay, job_in, run_to_end, trial_id_of, trial_job
from nanovlm.cluster.worker_group import StartWorkers, worker_groups
from nanovlm.cluster.worker_pool import (
    INTERRUPTED,
    OnEvent,
    OnStart,
    StopSwitch,
    WorkerPool,
    worker_pool,
)
from nanovlm.config.search_settings import Objective
from nanovlm.errors import RunFailed, UserError, did_you_mean
from nanovlm.files import remove_folder
from nanovlm.messages import Decision, Job, Kind, Notice, TrialRecord, measured
from nanovlm.pruning.decisions import PruningDecision
from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.pruning.successive_halving import SuccessiveHalving, build_rungs
from nanovlm.results.read import RUNGS_FILE
from nanovlm.results.retention import state_dir
from nanovlm.samplers.configurations import RunConfigurations
from nanovlm.search.confirm import ConfirmRun, plan_confirmation
from nanovlm.search.limits import Limits, hours_reason
from nanovlm.search.plan import SearchPlan
from nanovlm.search.sampler_failures import SamplerFailures
from nanovlm.search.scheduler import RungScheduler
from nanovlm.search.searcher import Pauses, StudySearch, build_searcher
from nanovlm.search.study import open_study
from nanovlm.search.warm_start import learn_from

_UNLIMITED_TRIALS = -1
"""Tune's word for a search that something else ends: here the searcher, which counts the trials.
Tune would count one that pauses and goes on twice."""

_MAX_LOST_RELAYS = 20
"""So often Tune begins a trial again whose actor was lost."""


@dataclass(frozen=True)
class ResumeState:
    """What there is already of a search that goes on."""

    records: Sequence[TrialRecord] = ()
    """Trials that have ended; they count for the budget and for what others are compared with."""
    confirmed: Sequence[TrialRecord] = ()
    """Runs of the second stage that have ended."""
    paused: Mapping[int, TrialRecord] = field(default_factory=dict)
    """Trials that had paused when they were last heard of, by number."""
    seconds: float = 0.0
    """How long it ran."""


@dataclass(frozen=True)
class Place:
    """Where a search runs, and who is told of it."""

    folder: Path
    """The results folder."""
    on_start: OnStart
    """Told once for each time that worker groups start."""
    on_event: OnEvent
    """Told of every change of a trial or of a run of the second stage, of updates, and of what
    a person should know."""
    address: str | None = None
    """Of a Ray cluster to join; None starts one here and ends it afterwards."""
    concurrency: int | None = None
    """Trials at once; None takes what fits on the cluster."""
    start_workers: StartWorkers = worker_groups
    """Starts what serves the trials."""
    sampler_failures: SamplerFailures = field(default_factory=SamplerFailures)
    """Counts them."""
    max_states: int | None = None
    """Of paused trials that are kept on the disk at most; None keeps all."""


def run_stages(plan: SearchPlan, place: Place, earlier: ResumeState | None = None) -> str:
    """Run the search of `plan` in a results folder that exists; return why it ended.

    `INTERRUPTED` is by a signal; any other reason is that of the first stage's end, after which the
    second one has run.

    Raises:
        UserError: the cluster cannot run the trials, the study cannot be used, or no report has the
            objective.
        RunFailed: a part of the cluster is lost without which the search cannot go on.
    """
    search = _Search(plan, replace(place, folder=place.folder.resolve()), earlier or ResumeState())
    open_study(plan.space, search.place.folder)  # before Ray takes its time
    reason = search.reason_to_end()
    if reason is None:
        with search.worker_pool(search.switch, max_concurrency=search.slots_needed()) as running:
            search.run_trials(running)
            reason = search.switch.reason or search.reason_to_end()
            if search.switch.reason is None:  # the workers are there
                search.switch.lift_limit()
                search.confirm(running)
        search.raise_problem()
    reason = search.switch.reason or reason
    if reason is None:
        raise RunFailed(f"Ray Tune has ended before the search was over; see {search.logs}")
    if reason == INTERRUPTED or not search.runs_to_confirm():
        return reason
    # A limit has sent the workers home, or the search was interrupted in its second stage.
    switch = StopSwitch()
    with search.worker_pool(switch, max_concurrency=len(search.runs_to_confirm())) as running:
        search.confirm(running)
    return switch.reason or reason


@dataclass
class _Search:
    """A search on its way."""

    plan: SearchPlan
    place: Place
    earlier: ResumeState
    switch: StopSwitch = field(init=False)
    logs: Path = field(init=False)
    _ended: list[TrialRecord] = field(init=False)
    _confirmed: list[TrialRecord] = field(init=False)
    _problem: UserError | None = None
    _silent: set[int] = field(default_factory=set)
    """Milestones of which a person knows that they do not decide."""
    _space_used_up: str | None = None
    """Why no configuration is left, as the searcher says, who knows of other searches too."""

    def __post_init__(self) -> None:
        budget = self.plan.space.budget
        self.switch = StopSwitch(budget.seconds_left(self.earlier.seconds), hours_reason(budget))
        self._ended, self._confirmed = list(self.earlier.records), list(self.earlier.confirmed)
        self.logs = self.place.folder / "logs"
        self._limits = Limits(self.plan.space, self.switch, self.logs)
        self._limits.replay(self.earlier.records)

    def worker_pool(self, switch: StopSwitch, max_concurrency: int | None) -> Any:
        """Return the context of the worker groups."""
        place = self.place
        return worker_pool(
            place.address,
            self.plan.space.resources,
            concurrency=place.concurrency,
            max_concurrency=max_concurrency,
            folder=place.folder,
            switch=switch,
            on_start=place.on_start,
            on_event=self._take,
            start_workers=place.start_workers,
        )

    def slots_needed(self) -> int | None:
        """Return how many trials can run at once at most, None if nothing limits them."""
        left = (self.trials_left(), RunConfigurations(self.plan.space, self._ended).num_left)
        return min((number for number in left if number is not None), default=None)

    def trials_left(self) -> int | None:
        """Return how many trials the budget still allows, None if it does not count them."""
        trials = self.plan.space.budget.trials
        return None if trials is None else trials - len(self._ended)

    def reason_to_end(self) -> str | None:
        """Return why no trial is to run any more, None if there are some to run."""
        left = self.trials_left()
        if self.switch.reason:
            return self.switch.reason
        if left is not None and left <= 0:
            return f"budget.trials: {len(self._ended)} trials are done"
        used_up = RunConfigurations(self.plan.space, self._ended).reason_to_end()
        if used_up or self._space_used_up:
            return used_up or self._space_used_up
        seconds = self.plan.space.budget.seconds_left(self.earlier.seconds)
        return (
            hours_reason(self.plan.space.budget) if seconds is not None and seconds <= 0 else None
        )

    def run_trials(self, running: WorkerPool) -> None:
        """Run the first stage; returns when the budget is used up or the switch is thrown."""
        space, folder = self.plan.space, self.place.folder
        rungs = build_rungs(space, self.plan.milestones, folder / RUNGS_FILE)
        answer = functools.partial(self._take_decision, running.broker, rungs)
        pauses = None
        if isinstance(rungs, PausingHalving):
            self._take_up_paused(running, rungs)
            pauses = Pauses(rungs, answer, self.place.max_states, self._let_go)
        searcher = build_searcher(
            space,
            folder,
            running.concurrency,
            self.switch,
            self.plan.milestones,
            self.earlier.records,
            self.place.sampler_failures,
            most_trials=space.budget.trials,
            pauses=pauses,
        )
        learn_from(searcher, self.plan.earlier_trials, self.plan.trial_samples)
        scheduler = RungScheduler(rungs, answer, self.switch.fail)
        if searcher.reason_to_end() is None:
            self._tune(running, searcher, scheduler)
        running.flush_events()  # Tune may have heard of the last trials first
        searcher.tell_ended(self._ended)
        self._space_used_up = searcher.reason_to_end()
        self._tell_correlations(searcher)

    def _tell_correlations(self, searcher: StudySearch) -> None:
        """Tell a person how well earlier searches of other lengths foresaw this one."""
        for name, correlation in searcher.correlations().items():
            text = (
                f"warm start: what {name} led to expect and what trials came to have a rank "
                f"correlation of {correlation:.2f} (1: the same order, 0: it told nothing)"
            )
            self.place.on_event(Notice(text=text))

    def _take_up_paused(self, running: WorkerPool, rungs: PausingHalving) -> None:
        """Let the trials wait that had paused when the search was interrupted."""
        waiting = {
            number: record
            for number, record in self.earlier.paused.items()
            if number in rungs.paused and record.samples_seen == rungs.paused[number].samples_seen
        }
        rungs.keep_waiting(waiting, {record.number for record in self._ended})
        plan, folder = self.plan, self.place.folder
        for number, record in waiting.items():
            job = trial_job(plan.space, plan.milestones, folder, number, record.parameters)
            ray.get(running.broker.take_up.remote(job, record))

    def _take_decision(
        self, broker: Any, rungs: SuccessiveHalving | PausingHalving, decision: PruningDecision
    ) -> None:
        """Let the trial know what was decided, and a person if a milestone has ceased to decide."""
        _answer(broker, decision)
        silent = rungs.silent_milestones() if isinstance(rungs, PausingHalving) else {}
        for milestone in silent.keys() - self._silent:
            self._silent.add(milestone)
            text = (
                f"{self.plan.space.objective.metric} at {milestone} samples says nothing of what "
                f"trials come to later (rank correlation {silent[milestone]:.2f}), so trials pass "
                "that milestone without a comparison"
            )
            self.place.on_event(Notice(text=text))

    def _let_go(self, number: int) -> None:
        """Remove the state of a paused trial; if it goes on it trains again from its start."""
        remove_folder(state_dir(self.place.folder, trial_id_of(number)))

    def runs_to_confirm(self) -> tuple[ConfirmRun, ...]:
        """Return the runs of the second stage that are certain now and have not ended."""
        return plan_confirmation(self.plan.space, self._ended, self._confirmed).runs

    def confirm(self, running: WorkerPool) -> None:
        """Run the second stage: what has ended decides what follows."""
        run_to_end(
            running.broker,
            lambda: [self._job(run) for run in self.runs_to_confirm()],
            running.concurrency,
        )

    def raise_problem(self) -> None:
        """Raise the user's mistake that a report has shown."""
        if self._problem is not None:
            raise self._problem

    def _job(self, run: ConfirmRun) -> Job:
        return job_in(
            self.place.folder,
            run.trial_id,
            kind=Kind.CONFIRM,
            number=run.number,
            parameters=run.parameters,
            config=run.config,
            milestones=self.plan.milestones,
        )

    def _take(self, event: Event) -> None:
        """Take in what has happened."""
        if not isinstance(event, TrialRecord):
            self.place.on_event(event)
        elif event.confirms:
            if event.end is not None:
                self._confirmed.append(event)
            self.place.on_event(event)
        else:
            self._take_trial(event)

    def _take_trial(self, record: TrialRecord) -> None:
        self._problem = self._problem or _wrong_objective(self.plan.space.objective, record)
        if self._problem is not None:
            self.switch.stop(str(self._problem))
            return
        if record.end is not None:
            self._ended.append(record)
        self.place.on_event(record)
        self._limits.check(record)

    def _tune(self, running: WorkerPool, searcher: StudySearch, scheduler: RungScheduler) -> None:
        """Let Ray Tune run the trials; returns after them or when the switch is thrown."""
        space, folder, broker = self.plan.space, self.place.folder, running.broker
        trainable = tune.with_parameters(
            TrialRelay,
            broker=broker,
            space=space,
            milestones=self.plan.milestones,
            folder=folder,
        )
        tuner = tune.Tuner(
            # Tune wants every trial to ask for something; this takes nothing from the workers.
            tune.with_resources(trainable, {"node:__internal_head__": 0.001}),
            tune_config=tune.TuneConfig(
                num_samples=_UNLIMITED_TRIALS,
                search_alg=searcher,
                scheduler=scheduler,
                max_concurrent_trials=running.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder / "logs" / "ray"),
                storage_filesystem=LocalFileSystem(),
                failure_config=tune.FailureConfig(max_failures=_MAX_LOST_RELAYS),
                stop=_StopperOf(self.switch),
                verbose=0,
            ),
        )
        tuner.fit()
        if not self.switch.is_thrown():
            given_up = f"Ray Tune has lost its actor {_MAX_LOST_RELAYS} times; see {self.logs}"
            ray.get(broker.give_up.remote(given_up))


def _answer(broker: Any, decision: PruningDecision) -> None:
    """Let the trial know what was decided on its report."""
    answer = Decision.PAUSE if decision.is_paused else Decision.STOP
    if decision.goes_on:
        answer = Decision.CONTINUE
    reason = None if decision.goes_on else decision.reason
    broker.decide.remote(trial_id_of(decision.number), decision.samples_seen, answer, reason)


class _StopperOf(tune.Stopper):
    """Ends the experiment when the switch is thrown."""

    def __init__(self, switch: StopSwitch) -> None:
        self._switch = switch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._switch.is_thrown()


def _wrong_objective(objective: Objective, record: TrialRecord) -> UserError | None:
    """Return what is wrong if a trial's report has not all objectives."""
    if not record.reports:
        return None
    found = measured(record.reports[-1])
    for place, metric in enumerate(each.metric for each in objective.all):
        if metric not in found:
            return UserError(
                f"{objective.location(place)}.metric: the reports of {record.trial_id} have no "
                f"{metric!r}.{did_you_mean(metric, found)}"
            )
    return None
