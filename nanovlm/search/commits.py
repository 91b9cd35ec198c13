"""Decisions on reports: made safe together, then answered together.

Ray Tune asks for one decision after another. Each is a line of `rungs.jsonl` as soon as it is made,
but it survives a power loss only after a sync, which may take longer than all the rest. So a thread
syncs the log once for all the decisions that were made during the last sync. A single one is synced
at once.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from nanovlm.files import or_cut_back
from nanovlm.results.decisions import PruningDecision


class DecisionCommits:
    """A context that lets nobody act on a decision before it is safe on the disk; at its end all
    decisions are."""

    def __init__(
        self,
        log: Path,
        answer: Callable[[Sequence[PruningDecision]], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            log: the file that decisions are written to before they are put here.
            answer: called in another thread with decisions that are safe, in their order; returns
                when they are known. Those that are made meanwhile come together in its next call.
            on_failure: called with why decisions could not be made safe or answered; they and all
                that follow are not answered then.
        """
        self._log = log
        self._answer = answer
        self._on_failure = on_failure
        self._safe_size = log.stat().st_size if log.exists() else 0
        self._waiting: queue.SimpleQueue[PruningDecision | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="decisions", daemon=True)

    def __enter__(self) -> "DecisionCommits":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waiting.put(None)
        self._thread.join()

    def put(self, decision: PruningDecision) -> None:
        """Have a decision that is written answered; does not wait for it."""
        self._waiting.put(decision)

    def _work(self) -> None:
        is_over = False
        while not is_over:
            batch = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._waiting.get_nowait())
            is_over = batch[-1] is None
            decisions = [decision for decision in batch if decision is not None]
            try:
                if decisions:
                    self._sync()
                    self._answer(decisions)
            except Exception as error:
                self._on_failure(error)
                return

    def _sync(self) -> None:
        """Make the log safe; lines that cannot be are cut off, as if they had not been written."""
        with self._log.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            with or_cut_back(file, self._safe_size):
                os.fsync(file.fileno())
        self._safe_size = size
