"""The two stages of a search: Optuna suggests, Tune and the rungs decide, worker groups train.

In the first stage trials run until a limit of the budget is reached. In the second one the best
configurations and the default one race each other on fresh seeds, which decides between them. Both
can be interrupted and resumed.
"""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray import tune

from nanovlm.cluster.broker_client import BrokerClient, TrialDecision
from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.relay import TrialRelay, job_in, run_to_end, trial_id_of, trial_job
from nanovlm.cluster.worker_groups import StartWorkers, worker_groups
from nanovlm.cluster.worker_pool import (
    INTERRUPTED,
    OnEvents,
    OnStart,
    StopSwitch,
    WorkerPool,
    worker_pool,
)
from nanovlm.config.search_settings import Objective
from nanovlm.errors import RunFailed, UserError, did_you_mean
from nanovlm.files import remove_folder
from nanovlm.messages import Decision, Job, Kind, Notice, TrialRecord, measured
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.pruning.successive_halving import SuccessiveHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import LOGS_DIR, RUNGS_FILE
from nanovlm.results.retention import state_dir
from nanovlm.search.commits import DecisionCommits
from nanovlm.search.confirm import ConfirmRun, plan_confirmation
from nanovlm.search.limits import Limits, RunConfigurations, hours_reason
from nanovlm.search.plan import SearchPlan
from nanovlm.search.searcher import OnDecision, Pauses, RungScheduler, StudySearch
from nanovlm.search.study import StudyLocation, open_study
from nanovlm.search.study_recorder import patiently
from nanovlm.search.tune_threads import trials_in_threads
from nanovlm.search.tune_trials import TrialMaker
from nanovlm.search.warm_start import learn_from

_UNLIMITED_TRIALS = -1
"""Tune sets no limit: the searcher counts the trials, since Tune would count one that pauses and
goes on twice. It also counts the concurrent ones, whose number follows the cluster."""


@dataclass(frozen=True)
class ResumeState:
    """The progress of a search that is resumed."""

    records: Sequence[TrialRecord] = ()
    """Trials that have ended; they count for the budget and for what others are compared with."""
    confirmed: Sequence[TrialRecord] = ()
    """Runs of the second stage that have ended."""
    paused: Mapping[int, TrialRecord] = field(default_factory=dict)
    """Trials that were paused, by number."""
    seconds: float = 0.0
    """How long it has run."""


@dataclass
class Search:
    """A search in a results folder that exists."""

    plan: SearchPlan
    folder: Path
    on_start: OnStart
    """Called each time that worker groups start."""
    on_events: OnEvents
    """Called with every change of a trial or of a run of the second stage, with progress updates,
    and with notices for the user."""
    earlier: ResumeState = field(default_factory=ResumeState)
    address: str | None = None
    """Of a Ray cluster to join; None starts one here and ends it afterwards."""
    concurrency: int | None = None
    """Concurrent trials; None takes what fits on the cluster."""
    start_workers: StartWorkers = worker_groups
    """Starts what serves the trials."""
    max_states: int | None = None
    """Of paused trials that are kept on the disk at most; None keeps all."""

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self._logs = self.folder / LOGS_DIR
        space, budget = self.plan.space, self.plan.space.budget
        self._switch = StopSwitch(budget.seconds_left(self.earlier.seconds), hours_reason(budget))
        self._ended, self._confirmed = list(self.earlier.records), list(self.earlier.confirmed)
        self._limits = Limits(space, self._switch, self._logs)
        self._limits.replay(self.earlier.records)
        self._problem: UserError | None = None  # the user's mistake that a report has shown
        self._silent = set[int]()  # milestones that do not decide, of which the user was notified
        self.sampler_note: str | None = None
        """How often the sampler failed, if it did."""
        self._space_used_up: str | None = None  # by the searcher, who knows of other searches too

    def run(self) -> str:
        """Run both stages; return why the search ended.

        `INTERRUPTED` is by a signal; any other reason is that of the first stage's end, after which
        the second one has run.

        Raises:
            UserError: the cluster cannot run the trials, the study cannot be used, or no report has
                the objective.
            RunFailed: a part of the cluster is lost without which the search cannot go on.
        """
        study = open_study(self.plan.space, self.folder)  # before Ray takes its time
        reason = self._reason_to_end()
        if reason is None:
            with self._worker_pool(self._switch, max_concurrency=self._slots_needed()) as pool:
                self._run_trials(pool, study)
                reason = self._switch.reason or self._reason_to_end()
                if self._switch.reason is None:  # the workers are there
                    self._switch.lift_limit()
                    self._confirm(pool)
            if self._problem is not None:
                raise self._problem
        reason = self._switch.reason or reason
        if reason is None:
            raise RunFailed(f"Ray Tune has ended before the search was over; see {self._logs}")
        if reason == INTERRUPTED or not self._runs_to_confirm():
            return reason
        # A limit has sent the workers home, or the search was interrupted in its second stage.
        switch = StopSwitch()
        with self._worker_pool(switch, max_concurrency=len(self._runs_to_confirm())) as pool:
            self._confirm(pool)
        return switch.reason or reason

    def _worker_pool(
        self, switch: StopSwitch, max_concurrency: int | None
    ) -> AbstractContextManager[WorkerPool]:
        return worker_pool(
            self.address,
            self.plan.space.resources,
            concurrency=self.concurrency,
            max_concurrency=max_concurrency,
            folder=self.folder,
            switch=switch,
            on_start=self.on_start,
            on_events=self._take,
            start_workers=self.start_workers,
            check=NodeCheck.of(self.plan.space.base, self.plan.data),
        )

    def _slots_needed(self) -> int | None:
        """Return how many concurrent trials there can be at most, None if nothing limits them."""
        left = (self._trials_left(), RunConfigurations(self.plan.space, self._ended).num_left)
        return min((number for number in left if number is not None), default=None)

    def _trials_left(self) -> int | None:
        """Return how many trials the budget still allows, None if it does not count them."""
        trials = self.plan.space.budget.trials
        return None if trials is None else trials - len(self._ended)

    def _reason_to_end(self) -> str | None:
        """Return why no more trials run, None if there are some to run."""
        left, budget = self._trials_left(), self.plan.space.budget
        if self._switch.reason:
            return self._switch.reason
        if left is not None and left <= 0:
            return f"budget.trials: {len(self._ended)} trials are done"
        used_up = RunConfigurations(self.plan.space, self._ended).reason_to_end()
        if used_up or self._space_used_up:
            return used_up or self._space_used_up
        seconds = budget.seconds_left(self.earlier.seconds)
        return hours_reason(budget) if seconds is not None and seconds <= 0 else None

    def _run_trials(self, pool: WorkerPool, study: StudyLocation) -> None:
        """Run the first stage; returns when the budget is used up or the switch is thrown."""
        space, folder = self.plan.space, self.folder
        rungs = build_rungs(space, self.plan.milestones, folder / RUNGS_FILE)
        answer = functools.partial(_answer, pool.client)
        with DecisionCommits(folder / RUNGS_FILE, answer, self._switch.fail) as commits:
            on_decision = functools.partial(self._take_decision, commits.put, rungs)
            pauses = None
            if isinstance(rungs, PausingHalving):
                self._resume_paused(pool, rungs)
                pauses = Pauses(rungs, on_decision, self.max_states, self._drop_state)
            searcher = self._open_searcher(pool, study, pauses)
            if searcher is None:
                return  # the storage was away, and something has ended the search
            if searcher.reason_to_end() is None:
                self._tune(pool, searcher, RungScheduler(rungs, on_decision, self._switch.fail))
        pool.flush_events()  # Tune may have heard of the last trials first
        searcher.end_recorded(self._ended)
        self._space_used_up = searcher.reason_to_end()
        self.sampler_note = searcher.recorder.sampler_note()
        self._notify_of_correlations(searcher)

    def _open_searcher(
        self, pool: WorkerPool, study: StudyLocation, pauses: Pauses | None
    ) -> StudySearch | None:
        """Return what asks for trials; None if the search ends before its storage answers, which
        it did before the workers started."""
        space = self.plan.space

        def begin() -> StudySearch:
            searcher = StudySearch(
                space,
                self.folder,
                pool.concurrency,
                self._switch,
                self.plan.milestones,
                self.earlier.records,
                self._notify,
                num_slots=pool.num_slots,
                most_trials=space.budget.trials,
                pauses=pauses,
            )
            learn_from(searcher.recorder, self.plan.earlier_trials, self.plan.trial_samples)
            return searcher

        if study.file is not None:
            return begin()
        return patiently(
            begin, self._switch, self._notify, lambda error: study.without_password(str(error))
        )

    def _notify(self, text: str) -> None:
        self.on_events([Notice(text=text)])

    def _notify_of_correlations(self, searcher: StudySearch) -> None:
        """Notify the user how well earlier searches of other lengths predicted this one."""
        for name, correlation in searcher.correlations().items():
            text = (
                f"warm start: what {name} led to expect and what trials came to have a rank "
                f"correlation of {correlation:.2f} (1: the same order, 0: it told nothing)"
            )
            self._notify(text)

    def _resume_paused(self, pool: WorkerPool, rungs: PausingHalving) -> None:
        """Let the trials that were paused when the search was interrupted wait again."""
        waiting = {
            number: record
            for number, record in self.earlier.paused.items()
            if number in rungs.paused and record.samples_seen == rungs.paused[number].samples_seen
        }
        rungs.keep_waiting(waiting, {record.number for record in self._ended})
        plan, folder = self.plan, self.folder
        for number, record in waiting.items():
            job = trial_job(plan.space, plan.milestones, folder, number, record.parameters)
            pool.client.take_up(job, record)

    def _take_decision(
        self, commit: OnDecision, rungs: SuccessiveHalving, decision: PruningDecision
    ) -> None:
        """Have a decision answered, and notify the user if a milestone stops deciding."""
        commit(decision)
        silent = rungs.silent_milestones() if isinstance(rungs, PausingHalving) else {}
        for milestone in silent.keys() - self._silent:
            self._silent.add(milestone)
            text = (
                f"{self.plan.space.objective.metric} at {milestone} samples says nothing of what "
                f"trials come to later (rank correlation {silent[milestone]:.2f}), so trials pass "
                "that milestone without a comparison"
            )
            self._notify(text)

    def _drop_state(self, number: int) -> None:
        """Remove the state of a paused trial; if it goes on it trains again from its start."""
        remove_folder(state_dir(self.folder, trial_id_of(number)))

    def _runs_to_confirm(self) -> tuple[ConfirmRun, ...]:
        """Return the runs of the second stage that are certain now and have not ended."""
        return plan_confirmation(self.plan.space, self._ended, self._confirmed).runs

    def _confirm(self, pool: WorkerPool) -> None:
        """Run the second stage: what has ended decides what follows."""
        run_to_end(
            pool.client,
            lambda: [self._job(run) for run in self._runs_to_confirm()],
            pool.num_slots,
        )

    def _job(self, run: ConfirmRun) -> Job:
        return job_in(
            self.folder,
            run.trial_id,
            kind=Kind.CONFIRM,
            number=run.number,
            parameters=run.parameters,
            config=run.config,
            milestones=self.plan.milestones,
        )

    def _take(self, events: Sequence[Event]) -> None:
        """Record events, pass them on and check the limits."""
        taken = [event for event in events if self._is_right(event)]
        records = [event for event in taken if isinstance(event, TrialRecord)]
        for record in records:
            if record.end is not None:
                (self._confirmed if record.confirms else self._ended).append(record)
        self.on_events(taken)
        for record in records:
            if not record.confirms:
                self._limits.check(record)

    def _is_right(self, event: Event) -> bool:
        """Return False if the event is of a trial whose reports show a mistake of the user, and end
        the search."""
        if not isinstance(event, TrialRecord) or event.confirms:
            return True
        self._problem = self._problem or _wrong_objective(self.plan.space.objective, event)
        if self._problem is not None:
            self._switch.stop(str(self._problem))
        return self._problem is None

    def _tune(self, pool: WorkerPool, searcher: StudySearch, scheduler: RungScheduler) -> None:
        """Let Ray Tune run the trials; returns after them or when the switch is thrown."""
        plan = self.plan
        relay = functools.partial(TrialRelay, pool.client, plan.space, plan.milestones, self.folder)
        tuner = tune.Tuner(
            TrialRelay,
            tune_config=tune.TuneConfig(
                num_samples=_UNLIMITED_TRIALS,
                search_alg=TrialMaker(searcher),
                scheduler=scheduler,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self._logs / "ray"),
                storage_filesystem=LocalFileSystem(),
                stop=_SwitchStopper(self._switch),
                verbose=0,
            ),
        )
        with trials_in_threads(relay):
            tuner.fit()


def _answer(client: BrokerClient, decisions: Sequence[PruningDecision]) -> None:
    answers = list[TrialDecision]()
    for decision in decisions:
        answer = Decision.PAUSE if decision.is_paused else Decision.STOP
        if decision.goes_on:
            answer = Decision.CONTINUE
        reason = None if decision.goes_on else decision.reason
        answers.append((trial_id_of(decision.number), decision.samples_seen, answer, reason))
    client.decide(answers)


class _SwitchStopper(tune.Stopper):
    """Ends the experiment when the switch is thrown."""

    def __init__(self, switch: StopSwitch) -> None:
        self._switch = switch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._switch.is_thrown()


def _wrong_objective(objective: Objective, record: TrialRecord) -> UserError | None:
    """Return what is wrong if a trial's report lacks an objective."""
    if not record.reports:
        return None
    found = measured(record.reports[-1])
    for index, metric in enumerate(each.metric for each in objective.all):
        if metric not in found:
            return UserError(
                f"{objective.location(index)}.metric: the reports of {record.trial_id} have no "
                f"{metric!r}.{did_you_mean(metric, found)}"
            )
    return None
