"""What runs in each process of a worker group: one trial after another, from the broker.

The process lives as long as the search, and so does its `Resources`: libraries, data, models and
compiled code are there when the next trial comes. Rank 0 calls the broker and broadcasts its
answers; all ranks make the same reports, so they start and end each trial together.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train.torch
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError

from nanovlm import parallel
from nanovlm.cluster.file_server import FileAccess
from nanovlm.cluster.logs import LogFile, LogRelay
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.transfer import NodeFiles, node_files
from nanovlm.errors import UserError
from nanovlm.files import find_full_disk
from nanovlm.messages import Assignment, Decision, End, Job, Order, ProgressUpdate, Report
from nanovlm.resources import Resources
from nanovlm.training.meter import OnUpdate
from nanovlm.training.steps import NonFiniteLossError, TrialInterrupted
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

_SEEN_BY_ALL_RANKS = (UserError, NonFiniteLossError)
"""Failures that every rank meets at the same step; after any other one ranks may be out of step."""

LOST_SERVER = "the process on the driver's node that takes in files (FileServer) is lost"


RunTrial = Callable[[Job, Resources, Callable[[], bool], OnUpdate], Generator[Report, None, None]]
"""The signature of `nanovlm.trial.run_trial`."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker group is started with."""

    group: str
    broker: Any  # handle of the Broker actor
    log_dir: str
    run_trial: RunTrial = run_trial
    files: FileAccess | None = None
    """How to get to the results folder where its path leads elsewhere; None: the path is right."""
    check: NodeCheck | None = None
    """What this machine must have in common with that of the search; None: it is that one."""


def serve_trials(settings: WorkerSettings) -> None:
    """Run the broker's jobs until there are no more. The training function of a TorchTrainer."""
    with node_files(settings.files) as files, _logged(settings, files):
        began_at = psutil.Process().create_time()
        node = ray.get_runtime_context().get_node_id()
        ray.get(settings.broker.add_worker.remote(settings.group, node, os.getpid(), began_at))
        serve_broker(settings, ray.train.torch.get_device(), files)


def serve_broker(
    settings: WorkerSettings, device: torch.device, files: NodeFiles | None = None
) -> None:
    """Run the broker's jobs on `device` until there are no more.

    Args:
        files: of a group that does not see the results folder.

    Raises:
        UserError: this machine has other code or data than that of the search.
    """
    broker = settings.broker
    closed = threading.Event()
    if parallel.rank() == 0:
        threading.Thread(target=_wait_until_closed, args=(broker, closed), daemon=True).start()
    resources = Resources(device)
    if settings.check is not None:
        settings.check.verify(resources)
    while True:
        given = _from_rank_0(lambda: ray.get(broker.next_job.remote(settings.group)))
        if given is Order.SHUTDOWN:
            return
        if given is Order.RETRY:
            continue
        logger.info("trial %s starts: %s", given.job.trial_id, dict(given.job.parameters))
        _serve(settings, given, resources, closed.is_set, files)


def _serve(
    settings: WorkerSettings,
    given: Assignment,
    resources: Resources,
    interrupted: Callable[[], bool],
    files: NodeFiles | None,
) -> None:
    """Run one trial. Whatever goes wrong in it is reported and ends this trial alone."""
    broker, job, lease = settings.broker, given.job, given.lease
    started_at, made = time.time(), list[Report]()
    updates = _Updates(given.seconds_between_updates)

    def on_update(update: ProgressUpdate) -> None:
        if parallel.rank() == 0 and updates.is_wanted(update):
            broker.progress.remote(lease, update)  # best-effort: never blocks training

    def begin(job: Job, on_update: OnUpdate) -> Generator[Report, None, None]:
        return settings.run_trial(job, resources, interrupted, on_update)

    def hand_in(report: Report) -> Decision:
        first_step_at = started_at + seconds_to_first_step(report, made)
        made.append(report)
        return ray.get(broker.report.remote(lease, report, first_step_at, time.time()))

    try:
        trial = begin(job, on_update) if files is None else files.run(begin, job, lease, on_update)
        with contextlib.closing(trial) as reports:
            for report in reports:
                logger.info("trial %s reports at %d samples", job.trial_id, report.samples_seen)
                if _from_rank_0(lambda: hand_in(report)) is Decision.STOP:  # noqa: B023
                    break
        logger.info("trial %s ended at %d samples", job.trial_id, report.samples_seen)
    except TrialInterrupted:
        logger.info("trial %s was interrupted", job.trial_id)
    except ActorUnavailableError:  # the driver cannot be reached: the group starts again
        raise
    except Exception as error:
        logger.exception("trial %s failed", job.trial_id)
        _check_gpu()
        if reason := _reason_to_end_run(error):
            ray.get(broker.abort.remote(f"{job.trial_id}: {reason}"))
        else:
            failure = (kind_of_failure(error), _reason(error), time.time())
            ray.get(broker.fail.remote(lease, *failure))
        if parallel.world_size() > 1 and not isinstance(error, _SEEN_BY_ALL_RANKS):
            raise  # the other ranks may wait for this one: the group has to start again
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Updates:
    """Says which of a trial's progress updates are sent."""

    def __init__(self, seconds_between: float) -> None:
        self._seconds_between = seconds_between
        self._stage: str | None = None
        self._sent_at = 0.0

    def is_wanted(self, update: ProgressUpdate) -> bool:
        """Return whether an update comes long enough after the last that was sent, or is the first
        of its stage."""
        now = time.monotonic()
        is_new = update.stage != self._stage
        if not is_new and now - self._sent_at < self._seconds_between:
            return False
        self._stage, self._sent_at = update.stage, now
        return True


def _check_gpu() -> None:
    """Raise if the GPU has failed for this process.

    Every later call of CUDA would fail too, in every later trial. So the group has to start again
    in new processes, and the trial continues from its last report.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _reason_to_end_run(error: Exception) -> str | None:
    """Return what is wrong if it is not the trial's fault, and the next one would fail too."""
    if isinstance(error, ActorDiedError):
        return f"{LOST_SERVER}: {str(error).splitlines()[0]}"
    return find_full_disk(error)


def seconds_to_first_step(report: Report, made: Sequence[Report]) -> float:
    """Return the seconds from the start of a report's leg to the leg's first step.

    Args:
        made: the trial's earlier reports; those of earlier legs came before that step.
    """
    earlier = [r.seconds for r in made if r.seconds < report.first_step_seconds]
    return report.first_step_seconds - max(earlier, default=0.0)


def kind_of_failure(error: Exception) -> End:
    """Return the end of a trial that has raised this error."""
    if isinstance(error, NonFiniteLossError):
        return End.NOT_FINITE
    return End.OUT_OF_MEMORY if _is_out_of_memory(error) else End.ERROR


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What the CPU allocator raises has no class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    if _is_out_of_memory(error):
        return "out of memory: a smaller micro_batch_size needs less"
    if isinstance(error, _SEEN_BY_ALL_RANKS):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _from_rank_0(ask: Callable[[], Any]) -> Any:
    """Return on every rank what `ask` returns on rank 0."""
    return parallel.broadcast_object(ask() if parallel.rank() == 0 else None)


def _wait_until_closed(broker: Any, closed: threading.Event) -> None:
    try:
        ray.get(broker.wait_until_closed.remote())
    except ray.exceptions.RayActorError:
        logger.warning("the broker is gone: the search's program has ended")
    closed.set()


@contextlib.contextmanager
def _logged(settings: WorkerSettings, files: NodeFiles | None) -> Iterator[None]:
    """Log to this worker's file in the results folder meanwhile."""
    name = f"{settings.group}-rank-{parallel.rank()}.log"
    handler: logging.Handler
    if files is None:
        handler = LogFile(Path(settings.log_dir) / name)
    else:
        handler = LogRelay(lambda lines: files.append_log(name, lines))
    root = logging.getLogger("nanovlm")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()
