"""Ray Tune in one process and without a state of its own, by means of its private parts.

Tune has an actor for each trial that runs, on the driver's node: a process of 100 MiB that takes
1.5 s of CPU time to start. Here all that these do is wait for reports (`TrialRelay`), for which a
thread of the driver will do. Tune also writes its state to files again and again, which nobody
reads: what a search needs to go on is in the results folder and in the study. With 256 slots that
was a sixth of what its thread did. `tests/search/test_tune_threads.py` names what breaks when Ray
changes these parts.
"""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache


@contextlib.contextmanager
def trials_in_threads(make: Callable[..., Any]) -> Iterator[None]:
    """Have `Tuner.fit` run trials in threads of this process meanwhile.

    Args:
        make: returns a new trainable for the arguments by name that Tune gives its class.
    """
    before = tune_module.TuneController
    controller = functools.partial(_Controller, make)
    tune_module.TuneController = controller  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        tune_module.TuneController = before  # type: ignore[misc]


class _Controller(TuneController):
    def __init__(self, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._actor_manager = TrialThreads()  # type: ignore[assignment]
        self._actor_cache = _AllKept()
        self._class_cache = _Classes(make)  # type: ignore[assignment]
        self._has_state = False

    def get_trials(self) -> list[Trial]:
        """Return none. Tune would look for files of each at its end, and through all that there
        have ever been, before each result, for one that waits: it starts those anyway."""
        return []

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:
        """Write Tune's state once, since Tune looks for the file at its end."""
        if not self._has_state:
            self._has_state = True
            super().checkpoint(force=True, wait=True)

    def _mark_trial_to_checkpoint(self, trial: Trial) -> None:
        """Leave all trials out of that state."""


class _AllKept(_ObjectCache):
    """Trainables that wait for their next trials. Tune's cache drops all but one of those that
    become free at the same time."""

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        if force_all:
            yield from super().flush_cached_objects(force_all)


@dataclass(frozen=True)
class _Classes:
    """Stands for Tune's cache of actor classes."""

    make: Callable[..., Any]

    def get(self, trainable: type) -> Callable[..., Any]:
        return self.make


@dataclass(eq=False)
class _Task:
    """One call of a trainable's method."""

    on_result: Callable[[Any], object]
    """Gets what it returns, in Tune's thread."""
    do: Callable[[Any], Any]
    """Calls it."""


class _Thread:
    """A trainable, and the thread that makes it and then runs its methods one after another."""

    def __init__(
        self, name: str, make: Callable[[], Any], events: "queue.SimpleQueue[Any]"
    ) -> None:
        self._make = make
        self._events = events
        self._to_do = queue.SimpleQueue[_Task | None]()
        self.awaited = set[_Task]()
        """Tasks of which Tune wants the results."""
        self.is_ready = False
        """Whether Tune has been told that it is made."""
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, on_result: Callable[[Any], object], do: Callable[[Any], Any]) -> _Task:
        task = _Task(on_result, do)
        self.awaited.add(task)
        self._to_do.put(task)
        return task

    def end(self) -> None:
        """Let the thread end after the tasks that it has."""
        self._to_do.put(None)

    def _run(self) -> None:
        trainable: Any = None
        while (task := self._to_do.get()) is not None:
            try:
                trainable = self._make() if trainable is None else trainable
                result = task.do(trainable)
            except Exception as error:
                self._events.put((self, task, None, error))
            else:
                self._events.put((self, task, result, None))


class TrialThreads:
    """What Tune's controller asks of its RayActorManager; all methods are for its thread alone.

    An error in a trainable is one of this program, or says that the broker is lost: `next` raises
    it, and no trial is started again.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._events = queue.SimpleQueue[tuple[_Thread, _Task, Any, Exception | None]]()
        self._threads: dict[TrackedActor, _Thread] = {}
        # Tune looks in here for Ray's handle of the actor, of which it knows that there may be none
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[None, None]] = {}

    def next(self, timeout: float | None = None) -> bool:
        """Wait for a result, and pass on all that are there; return False if there is none in time.

        Tune looks for new trials before each call, which takes as long as a result does.
        """
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return False
        self._pass_on(*event)
        for _ in range(self._events.qsize()):
            self._pass_on(*self._events.get_nowait())
        return True

    def _pass_on(self, thread: _Thread, task: _Task, result: Any, error: Exception | None) -> None:
        if task in thread.awaited:
            if error is not None:
                raise error
            thread.awaited.remove(task)
            task.on_result(result)

    def add_actor(
        self,
        cls: Callable[..., Any],
        kwargs: Mapping[str, Any],
        resource_request: Any,
        on_start: Callable[[TrackedActor], None] | None = None,
        on_stop: Callable[[TrackedActor], None] | None = None,
        on_error: Callable[[TrackedActor, Exception], None] | None = None,
    ) -> TrackedActor:
        number = next(self._numbers)
        actor = TrackedActor(number, on_start, on_stop, on_error)
        thread = _Thread(f"slot-{number}", lambda: cls(**kwargs), self._events)
        self._threads[actor] = thread
        self._live_actors_to_ray_actors_resources[actor] = None, None

        def begin(_: Any) -> None:
            thread.is_ready = True
            if actor._on_start is not None:
                actor._on_start(actor)

        thread.call(begin, lambda trainable: None)
        return actor

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        on_result: Callable[[TrackedActor, Any], None] | None = None,
        on_error: Callable[[TrackedActor, Exception], None] | None = None,
        _return_future: bool = False,
    ) -> _Task:
        def pass_on(result: Any) -> None:
            if on_result is not None:
                on_result(tracked_actor, result)

        def do(trainable: Any) -> Any:
            return getattr(trainable, method_name)(*(args or ()), **(kwargs or {}))

        return self._threads[tracked_actor].call(pass_on, do)

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        if tracked_actor in self._threads:
            self._threads[tracked_actor].awaited.clear()

    def remove_actor(
        self, tracked_actor: TrackedActor, kill: bool = False, stop_future: _Task | None = None
    ) -> bool:
        """Forget a trainable once its method `stop` has run, or at once (`kill`).

        Tune hears no more of one of which it has not heard that it is made: its trial runs in
        another, which has become free meanwhile.
        """
        if tracked_actor not in self._threads:
            return False
        thread = self._threads[tracked_actor]
        if not thread.is_ready:
            tracked_actor.set_on_start(None)
            tracked_actor.set_on_stop(None)

        def forget(_: Any) -> None:
            del self._threads[tracked_actor]
            del self._live_actors_to_ray_actors_resources[tracked_actor]
            if tracked_actor._on_stop is not None:
                tracked_actor._on_stop(tracked_actor)

        if kill:
            thread.awaited.clear()
            forget(None)
        elif stop_future is not None:
            stop_future.on_result = forget
        else:
            thread.call(forget, lambda trainable: trainable.stop())
        thread.end()
        return True

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._threads

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    @property
    def num_live_actors(self) -> int:
        return len(self._threads)

    @property
    def num_total_actors(self) -> int:
        return len(self._threads)

    @property
    def num_pending_actors(self) -> int:
        return 0

    @property
    def num_actor_tasks(self) -> int:
        return sum(len(thread.awaited) for thread in self._threads.values())

    def get_live_actors_resources(self) -> dict[str, float]:
        return {}

    def cleanup(self) -> None:
        for thread in self._threads.values():
            thread.awaited.clear()
            thread.end()
        self._threads.clear()
        self._live_actors_to_ray_actors_resources.clear()
