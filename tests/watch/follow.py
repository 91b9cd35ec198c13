"""A program that follows the example run with W&B: it reads its settings once in a process.

python -m tests.watch.follow FOLDER STAGE    STAGE: interrupted, resumed, all

Prints a JSON object: what was told, what went wrong, and the seconds that the search waited.
"""

import json
import sys
import time
from pathlib import Path

import wandb  # noqa: F401  # before the clock runs; its import takes seconds on a busy machine

from nanovlm.watch.wandb_runs import WandbRuns
from tests.watch.example_run import (
    COMPLETED,
    ENDED,
    FAILED,
    STOPPED,
    follow_trial,
    record,
    start,
    summary,
    update,
)


def main(folder: Path, stage: str) -> None:
    told: list[str] = []
    observer = WandbRuns(told.append)
    started = time.monotonic()
    waited = 0.0
    if stage == "interrupted":
        observer.begin(start(folder, log_wandb=True))
        follow_trial(observer, COMPLETED)
        observer.trial_changed(record(1, 0, "running"))
        observer.progress(update(1, 50))
        observer.trial_changed(record(1, 1, "running"))
        observer.trial_changed(record(2, 1, "running"))
        observer.trial_changed(record(2, 1, "paused"))
    else:
        ended = (COMPLETED,) if stage == "resumed" else ()
        observer.begin(start(folder, log_wandb=True, records=ended))
        for trial in ENDED[len(ended) :]:
            follow_trial(observer, trial)
        assert ENDED[1:] == (STOPPED, FAILED)
    waited = time.monotonic() - started
    observer.end(summary("interrupted" if stage == "interrupted" else "budget.trials: done"))
    answer = {"told": told, "problem": observer.problem, "waited": waited}
    sys.stdout.write(json.dumps({**answer, "ended": time.monotonic() - started}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
