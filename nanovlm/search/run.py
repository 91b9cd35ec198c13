"""Runs a search from Python, as `run_search.py` does from the command line.

outcome = run_search("search_spaces/digits.yaml")
print(outcome.summary["best"]["parameters"], outcome.folder)
"""

from collections.abc import Sequence
from pathlib import Path

from nanovlm import process
from nanovlm.cluster.logs import logged_to
from nanovlm.cluster.recorder import Recorder, RunOutcome, standard_observers
from nanovlm.cluster.worker_groups import StartWorkers, worker_groups
from nanovlm.cluster.worker_pool import INTERRUPTED
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.data.build import OnProgress, log_progress
from nanovlm.errors import UserError
from nanovlm.files import user_path
from nanovlm.results.folder import (
    check_same_data,
    check_same_space,
    choose_folder,
    explain_full_disk,
)
from nanovlm.results.pareto import choose, describe_choice
from nanovlm.results.read import LOGS_DIR, SPACE_FILE
from nanovlm.results.remote import is_uri
from nanovlm.results.write import ResultsStore
from nanovlm.search.confirm import plan_confirmation
from nanovlm.search.disk import check_disk, disk_peak, max_paused_states
from nanovlm.search.forecast import UNKNOWN_TRIALS, local_slots
from nanovlm.search.plan import SearchPlan, plan_search
from nanovlm.search.resume import mend_search
from nanovlm.search.stages import ResumeState, Search
from nanovlm.watch.observer import Observer, RunStart


def run_search(
    space: SearchSpace | Path | str,
    folder: Path | str | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    concurrency: int | None = None,
    observers: Sequence[Observer] = (),
    on_progress: OnProgress = log_progress,
) -> RunOutcome:
    """Search a space from its plan to the confirming runs; return when it is over or interrupted.

    Args:
        space: a space file, or what `load_space` made of one.
        folder: the results folder, which must not exist yet; None takes the first free one of
            `results/NAME`, `results/NAME-2`, ... for the space's name.
        resume: go on with the search that was interrupted in `folder`.
        address: of a Ray cluster to join; None takes the one that RAY_ADDRESS names, or starts one
            here and ends it afterwards.
        concurrency: of trials; None takes what fits on the cluster.
        observers: called with what happens, besides those that every run has.
        on_progress: called while data is prepared.

    Raises:
        UserError: the space, the data, the cluster, the study or the folder cannot be used.
        RunFailed: the disk is full, or a part of the cluster is lost.
    """
    if not isinstance(space, SearchSpace):
        space = load_space(user_path(space))
    default_name = space.name if folder is None else None
    if is_uri(str(folder)):
        raise UserError(f"folder: must be a local path here, got {folder}; run_search.py takes it")
    folder = (
        choose_folder(Path("results"), None, space.name) if folder is None else user_path(folder)
    )
    if resume:
        check_same_space(folder, space)
    return run_plan(
        plan_search(space, on_progress),
        folder,
        default_name=default_name,
        resume=resume,
        address=address,
        concurrency=concurrency,
        observers=observers,
    )


def run_plan(
    plan: SearchPlan,
    folder: Path,
    *,
    default_name: str | None = None,
    resume: bool = False,
    address: str | None = None,
    concurrency: int | None = None,
    observers: Sequence[Observer] = (),
    start_workers: StartWorkers = worker_groups,
) -> RunOutcome:
    """Run a search that `plan_search` has planned; see `run_search`.

    Args:
        default_name: see `ResultsStore`.
        start_workers: starts what serves the trials.
    """
    unchecked = check_same_data(folder, plan.data) if resume else ()
    most_bytes, max_states = _check_room(plan, concurrency, folder)
    space, num_models = plan.space, max(1, plan.space.confirm.num_raced)
    gpus = space.resources.gpus_per_trial
    store = ResultsStore(folder, space.objective, gpus, num_models, default_name)
    with (
        process.in_order(),
        process.collecting_new_objects(),
        store.opened(resume=resume),
        logged_to(store.folder / LOGS_DIR),
        explain_full_disk(store.folder, most_bytes),
    ):
        mended = mend_search(space, folder, plan.milestones, store.records) if resume else []
        recorder = Recorder(store, _start(plan, store), [*standard_observers(), *observers])
        search = Search(
            plan,
            store.folder,
            on_start=recorder.begin,
            on_events=recorder.take,
            earlier=ResumeState(
                tuple(store.records), tuple(store.confirmed), store.paused, store.earlier_seconds
            ),
            address=address,
            concurrency=concurrency,
            start_workers=start_workers,
            max_states=max_states,
        )
        try:
            with recorder.errors_recorded():
                ended_by = search.run()
        except KeyboardInterrupt:  # while Ray starts, or for the second time from Python
            if not store.has_begun:
                raise
            ended_by = INTERRUPTED
        is_over = ended_by != INTERRUPTED
        summary = recorder.end(ended_by, is_settled=is_over)
        planned = plan_confirmation(space, store.records).notes if is_over else ()
        sampler = [search.sampler_note] if search.sampler_note else []
        notes = [*unchecked, *mended, *store.notes, *planned, *sampler]
        notes += [*recorder.notes(), *_chosen_again(space, store, recorder)]
    return RunOutcome(store.folder, summary, tuple(notes))


def _chosen_again(space: SearchSpace, store: ResultsStore, recorder: Recorder) -> list[str]:
    """Return a note on the choice in a search that was over: with other bounds of its objectives it
    may be another trial, and nothing ran that would show it."""
    if recorder.has_begun or len(space.objective.all) == 1:
        return []
    store.write_text(SPACE_FILE, space.to_yaml())
    choice = choose(store.records, space.objective)
    return [] if choice is None else [f"chosen: {describe_choice(choice, space.objective)}"]


def _start(plan: SearchPlan, store: ResultsStore) -> RunStart:
    return RunStart(
        folder=store.folder,
        config=plan.space.base,
        space=plan.space,
        objective=plan.space.objective,
        milestones=plan.milestones,
        trial_samples=plan.trial_samples,
        data=plan.data,
        description=plan.describe(),
        records=tuple(store.records),
        confirmed=tuple(store.confirmed),
        earlier_seconds=store.earlier_seconds,
    )


def _check_room(plan: SearchPlan, concurrency: int | None, folder: Path) -> tuple[int, int]:
    """Return the bytes that the search takes at most, and how many states of paused trials it
    keeps; raise UserError if there is less room, or fewer states than concurrent trials."""
    slots = concurrency or local_slots(plan.space.resources)
    max_paused = plan.space.scheduler.max_paused
    if max_paused is not None and max_paused < slots:
        raise UserError(
            f"scheduler.max_paused: must be at least the number of trials at once, {slots}, or "
            f"trials that pause together begin again, got {max_paused}"
        )
    peak = disk_peak(
        plan.space,
        num_trials=plan.space.most_trials or UNKNOWN_TRIALS,
        concurrency=slots,
        num_questions=plan.data["benchmark"]["samples"],
    )
    room = check_disk(peak, folder)
    return peak.total, max_paused_states(plan.space, peak, room)
