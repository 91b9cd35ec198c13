"""The worker groups of a run, which follow the cluster: they join and leave with its nodes."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from nanovlm.cluster.broker import GroupParts
from nanovlm.cluster.file_server import served_files
from nanovlm.cluster.group_trainer import NO_ROOM, GroupEnded, GroupTrainer, describe_failure
from nanovlm.cluster.node_requests import NodeRequests
from nanovlm.cluster.ray_cluster import describe_shortage, num_fitting
from nanovlm.cluster.ray_compat import start_run_records
from nanovlm.cluster.worker import RunTrial, WorkerSettings
from nanovlm.cluster.worker_group import ClusterSetup, end_groups, is_placed, make_trainer
from nanovlm.errors import RunFailed
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

DESERTED = "all worker groups have ended"

_GOODBYE_SECONDS = 20
"""How long a group may take to leave: a training step, an evaluation, or Ray's own clean-up."""

_MAX_FALSE_STARTS = 3
"""No more groups start after so many in a row ended before they asked for a job."""

_WAIT_FOR_ROOM_SECONDS = 1800.0
"""How long a run without worker groups waits for a node that has room for one."""


class WorkerGroups(Protocol):
    """The worker groups of a run."""

    def num_slots(self) -> int:
        """Return how many trials can run at the same time now."""

    def follow_cluster(self) -> None:
        """Start groups where there is room for them; called about once a second.

        Raises:
            RunFailed: if there is no group any more and none can be started.
        """

    def end_groups(self, names: Sequence[str]) -> None:
        """End groups that were lost; others take their places."""


StartWorkers = Callable[[int, int | None, Any, ClusterSetup], AbstractContextManager[WorkerGroups]]
"""The signature of `worker_groups`."""


@dataclass(frozen=True)
class _Group:
    trainer: GroupTrainer
    thread: threading.Thread
    """It runs the trainer."""


class RayWorkerGroups:
    """Worker groups that follow the cluster: each runs until it is lost or there is no more work.

    A group that has lost a worker or its node ends. A new one starts wherever there is room: on
    what the lost one has freed, or on a node that has joined.
    """

    def __init__(
        self,
        num_groups: int,
        most: int | None,
        broker: Any,
        setup: ClusterSetup,
        make_group: Callable[[str, Collection[str]], GroupTrainer],
    ) -> None:
        """Start `num_groups` worker groups.

        Args:
            most: so many groups run at most; None sets no limit but the cluster's.
            make_group: returns what runs the group of a name, on none of the nodes with the given
                ids.
        """
        self._most = most
        self._broker = broker
        self._setup = setup
        self._requests = NodeRequests(setup.resources)
        self._make_group = make_group
        self._numbers = itertools.count()
        self._groups: dict[str, _Group] = {}  # those that have not ended
        self._lost: set[str] = set()
        self._begun: set[str] = set()
        """Groups that have asked for a job."""
        self._placed: set[str] = set()
        """Groups that occupy what they have reserved."""
        self._false_starts = 0
        self._error: Exception | None = None
        """Why the last group has ended before it asked for a job."""
        self._unfit: set[str] = set()
        """Ids of nodes on which a group could not begin its work."""
        self._without_room_since: float | None = None
        self._is_over = False
        self._lock = threading.Lock()
        for _ in range(num_groups):
            self._start_group()

    def num_slots(self) -> int:
        return max(1, len(self._groups))

    def follow_cluster(self) -> None:
        num_unplaced = self._look_at_starts()
        if self._is_over or self._false_starts >= _MAX_FALSE_STARTS:
            self._check_groups()
            return
        room = num_fitting(self._setup.resources, self._unfit) - num_unplaced
        if self._most is not None:
            room = min(room, self._most - len(self._groups))
        started = [self._start_group() for _ in range(room)]
        if started:
            now = len(self._groups)
            self._notify(f"started {', '.join(started)}; concurrent trials now: {now}")
        if self._setup.asks_for_nodes and self._most is not None and not self._unfit:
            self._requests.update(self._most - len(self._groups))
        self._check_groups()

    def _look_at_starts(self) -> int:
        """Note what has become of the groups that start; return how many of them may not occupy
        yet what they need, so that it still counts as free."""
        begun = ray.get(self._broker.begun_groups.remote())
        if begun - self._begun:
            self._false_starts = 0
        self._begun = begun
        with self._lock:
            groups = dict(self._groups)
        unplaced = groups.keys() - begun - self._placed
        # They count once more: Ray publishes a little later what has been taken.
        self._placed.update(name for name in unplaced if is_placed(groups[name].trainer))
        return len(unplaced)

    def _check_groups(self) -> None:
        """Raise RunFailed if there is no group, and waiting does not help."""
        if self._groups or self._is_over:
            self._without_room_since = None
            return
        if self._error is not None and num_fitting(self._setup.resources):
            reason = describe_failure(self._error)
            raise RunFailed(f"{DESERTED}: {reason}; see {self._setup.log_dir}") from self._error
        now = time.monotonic()
        shortage = describe_shortage(self._setup.resources)
        if self._without_room_since is None:
            self._without_room_since = now
            self._notify(f"no node has room, and the run waits for one: {shortage}")
        if now - self._without_room_since > _WAIT_FOR_ROOM_SECONDS:
            minutes = _WAIT_FOR_ROOM_SECONDS / 60
            raise RunFailed(f"no node has had room for {minutes:.0f} minutes: {shortage}")

    def _notify(self, text: str) -> None:
        ray.get(self._broker.notify.remote(text))

    def end_groups(self, names: Sequence[str]) -> None:
        self._lost.update(names)
        with self._lock:
            trainers = [self._groups[name].trainer for name in names if name in self._groups]
        workers = list[tuple[int, float]]()
        with contextlib.suppress(RayActorError):  # then they end with what they have reserved
            parts: list[GroupParts] = ray.get([self._broker.parts_of.remote(n) for n in names])
            workers = [worker for each in parts for worker in each.workers]
        is_own = self._setup.is_own_cluster
        end_groups(trainers, workers, is_own, waits=not (is_own and self._is_over))

    def leave(self) -> None:
        try:
            ray.get(self._broker.close.remote())
            ray.wait([self._broker.wait_until_idle.remote()], timeout=_GOODBYE_SECONDS)
        except RayActorError:
            logger.warning("the broker is gone: trials at work are not waited for")
        self._is_over = True
        self._requests.update(0)
        # Again and again, for a group may be about to reserve something. A thread that is in Ray
        # when Ray is shut down would end this process.
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while (groups := dict(self._groups)) and time.monotonic() < deadline:
            self.end_groups(sorted(groups))
            next(iter(groups.values())).thread.join(1.0)

    def _start_group(self) -> str:
        name = f"group-{next(self._numbers)}"
        trainer = self._make_group(name, frozenset(self._unfit))
        thread = threading.Thread(target=self._serve, args=(name, trainer), name=name, daemon=True)
        with self._lock:
            self._groups[name] = _Group(trainer, thread)
        self._broker.expect.remote(name, self._setup.resources.workers)
        thread.start()
        return name

    def _serve(self, name: str, trainer: GroupTrainer) -> None:
        """Run a group to its end; it leaves by itself only when there is no more work."""
        try:
            trainer.fit()
            self._is_over = self._is_over or name not in self._lost
        except Exception as error:
            if not self._is_over:
                logger.exception("worker group %s has ended", name)
                with contextlib.suppress(RayActorError):  # the broker is lost too
                    self._take_loss(name, error)
        finally:
            with self._lock:
                del self._groups[name]

    def _take_loss(self, name: str, error: Exception) -> None:
        reason = describe_failure(error)
        had_asked = ray.get(self._broker.lose.remote(name, reason))
        if had_asked or reason == NO_ROOM:
            return
        parts: GroupParts = ray.get(self._broker.parts_of.remote(name))
        self._error = error
        if len(parts.nodes) == 1 and not isinstance(error, GroupEnded):
            self._unfit |= parts.nodes  # others may do
        else:
            self._false_starts += 1


@contextlib.contextmanager
def worker_groups(
    num_groups: int,
    most: int | None,
    broker: Any,
    setup: ClusterSetup,
    run_trial: RunTrial = run_trial,
) -> Iterator[WorkerGroups]:
    """Run worker groups on the connected cluster; at the end close the broker and end the groups.

    Args:
        num_groups: so many start.
        most: so many run at most, where the cluster has room for them; None: as many as fit.
        run_trial: what the workers run for each trial.
    """
    start_run_records()

    with served_files(setup.log_dir.parent, setup.is_own_cluster) as files:
        log_dir = str(setup.log_dir)

        def make_group(name: str, unfit: Collection[str]) -> GroupTrainer:
            settings = WorkerSettings(name, broker, log_dir, run_trial, files, setup.check)
            return make_trainer(settings, setup, unfit, most or num_groups)

        groups = RayWorkerGroups(num_groups, most, broker, setup, make_group)
        try:
            yield groups
        finally:
            groups.leave()
