"""Work in the background: in order, bounded at the end, and without an end to the run."""

import threading
import time

from nanovlm.watch.curves import Background


def test_jobs_are_done_in_order() -> None:
    background = Background("tracker")
    done: list[int] = []
    for number in range(100):
        background.do(lambda number=number: done.append(number))  # type: ignore[misc]
    background.close(seconds=10)
    assert done == list(range(100))
    assert background.problem is None


def test_a_failure_is_told_and_ends_the_tracker_alone() -> None:
    background = Background("tracker")
    done: list[str] = []

    def fail() -> None:
        raise OSError("the disk is full")

    background.do(lambda: done.append("before"))
    background.do(fail)
    background.do(lambda: done.append("after"))
    background.close(seconds=10)
    assert background.problem == (
        "tracker has failed, and recorded nothing after: the disk is full"
    )
    background.do(lambda: done.append("later"))
    background.close(seconds=10)
    assert done == ["before"]


def test_the_end_does_not_wait_for_ever() -> None:
    background = Background("tracker")
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    background.do(hang)
    started = time.monotonic()
    background.close(seconds=0.1)
    assert time.monotonic() - started < 5
    assert background.problem == (
        "tracker: not all of the run was recorded in the 0.1 s after its end"
    )
    release.set()


def test_without_work_there_is_no_thread() -> None:
    before = threading.active_count()
    Background("tracker").close(seconds=10)
    assert threading.active_count() == before
