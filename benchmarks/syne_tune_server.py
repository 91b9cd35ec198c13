"""Serves the decisions of Syne Tune's schedulers over a pipe, from an environment of its own.

    python -m venv syne && syne/bin/python -m pip install 'syne-tune[gpsearchers]==0.13.0'

0.13 is the last minor version with MOBSTER. This file imports Syne Tune and nothing else. It reads
one JSON object a line: first the setup (`method`, `seed`, `space`, `max_epochs`, `grace_period`),
then requests, and answers each with a line that says how long it has worked in all (`seconds` of a
processor). `syne_tune_client.py` is the other end.
"""

import json
import os
import sys
import time
from datetime import datetime
from typing import Any, TextIO

METRIC, EPOCH, MAX_EPOCHS = "accuracy", "epoch", "epochs"


class Server:
    """One search: the scheduler, called as Syne Tune's `Tuner` calls it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.optimizer.baselines import ASHA, MOBSTER

        self._make_trial = Trial
        self._scheduler = {"asha": ASHA, "mobster": MOBSTER}[setup["method"]](
            {**_domains(setup["space"]), MAX_EPOCHS: setup["max_epochs"]},
            metric=METRIC,
            mode="max",
            resource_attr=EPOCH,
            max_resource_attr=MAX_EPOCHS,
            grace_period=setup["grace_period"],
            type="promotion",
            random_seed=setup["seed"],
            search_options={"debug_log": False},
        )
        self._trials: dict[int, Any] = {}

    def rungs(self) -> dict[str, Any]:
        """Return the epochs at which trials report, the last included."""
        return {"rungs": [*self._scheduler.rung_levels, self._scheduler.max_resource_level]}

    def suggest(self) -> dict[str, Any]:
        """Return the trial that a free slot takes, with its values if it is new."""
        suggestion = self._scheduler.suggest(trial_id=len(self._trials))
        config = dict(suggestion.config)
        if not suggestion.spawn_new_trial_id:
            number = int(suggestion.checkpoint_trial_id)
            self._trials[number].config = config  # how far it trains is in there
            return {"trial": number}
        number = len(self._trials)
        trial = self._make_trial(trial_id=number, config=config, creation_time=datetime.now())
        self._trials[number] = trial
        self._scheduler.on_trial_add(trial=trial)
        return {"trial": number, "values": {k: v for k, v in config.items() if k != MAX_EPOCHS}}

    def report(self, trial: int, epoch: int, accuracy: float) -> dict[str, Any]:
        """Return whether a trial goes on at once after a report."""
        known = self._trials[trial]
        result = {METRIC: accuracy, EPOCH: epoch}
        decision = self._scheduler.on_trial_result(trial=known, result=result)
        if decision != "CONTINUE":
            self._scheduler.on_trial_remove(trial=known)
        return {"goes_on": decision == "CONTINUE"}


def _domains(space: dict[str, Any]) -> dict[str, Any]:
    """Return Syne Tune's domains of `kind` and `values`, both ends included."""
    from syne_tune.config_space import lograndint, loguniform, randint, uniform

    kinds: dict[str, Any] = {
        "uniform": uniform,
        "log_uniform": loguniform,
        "int": randint,
        "log_int": lograndint,
    }
    return {key: kinds[entry["kind"]](*entry["values"]) for key, entry in space.items()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    server = Server(json.loads(requests.readline()))
    answer = server.rungs()
    while True:
        answers.write(json.dumps({**answer, "seconds": time.process_time()}) + "\n")
        answers.flush()
        line = requests.readline()
        if not line:
            return
        request = json.loads(line)
        name = request.pop("do")
        answer = server.report(**request) if name == "report" else server.suggest()


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Syne Tune prints
    serve(sys.stdin, pipe)
