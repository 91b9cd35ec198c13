"""Syne Tune's schedulers as methods of a replay, which run in an environment of their own."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.replay_clock import Run
from benchmarks.replay_methods import Build, Setting
from benchmarks.replay_table import Curves

SERVER = Path(__file__).with_name("syne_tune_server.py")
GRACE_PERIOD = 2
"""Epochs before the first comparison, the rungs of 3 to the power of n beside the full length."""

MOST_SEEDS = 2**31
"""Of Syne Tune."""


class SyneTune:
    """A search of Syne Tune whose trials pause at rungs and are promoted from there."""

    pauses, prepares = True, False

    def __init__(self, curves: Curves, python: Path, log: Path, setup: dict[str, Any]) -> None:
        """Start the search's process; a context ends it.

        Args:
            curves: with a column for each epoch.
            python: the interpreter of an environment with Syne Tune.
            log: a file for what Syne Tune says.
            setup: see `syne_tune_server.py`.
        """
        self._curves, self._log = curves, log
        with log.open("w") as errors:  # a pipe would fill
            self._process = subprocess.Popen(
                [python, SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._columns = tuple(epoch - 1 for epoch in self._ask(setup)["rungs"])
        self._runs: dict[int, Run] = {}
        self._numbers: dict[Run, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def start(self) -> Run:
        answer = self._ask({"do": "suggest"})
        number = answer["trial"]
        if "values" in answer:
            row = self._curves.row_of(answer["values"])
            run = Run(f"trial-{number:04d}", row, self._columns)
            self._runs[number], self._numbers[run] = run, number
        return self._runs[number]

    def report(self, run: Run) -> bool:
        epoch = run.columns[run.num_reports - 1] + 1
        report = {"trial": self._numbers[run], "epoch": epoch, "accuracy": run.value(self._curves)}
        return bool(self._ask({"do": "report", **report})["goes_on"])

    def seconds(self) -> float:
        return self._seconds

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        pipe = self._process
        assert pipe.stdin is not None and pipe.stdout is not None, "both are pipes"
        try:
            pipe.stdin.write(json.dumps(request) + "\n")
            pipe.stdin.flush()
            line = pipe.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            pipe.wait()
            said = self._log.read_text()
            raise RuntimeError(f"{pipe.args!r} ended: {pipe.returncode}\n{said}")
        answer: dict[str, Any] = json.loads(line)
        self._seconds: float = answer["seconds"]
        return answer


def syne_tune(method: str) -> Build:
    """Return what builds a search of Syne Tune: `asha` or `mobster`."""

    def build(setting: Setting) -> SyneTune:
        assert setting.peer_python is not None, "--peer-python must name the interpreter"
        space = {p.key: {"kind": p.kind, "values": p.values} for p in setting.space.parameters}
        setup = {
            "method": method,
            "seed": setting.seed % MOST_SEEDS,
            "space": space,
            "max_epochs": setting.table.last + 1,
            "grace_period": GRACE_PERIOD,
        }
        log = setting.folder / "syne_tune.log"
        search = SyneTune(setting.table, setting.peer_python, log, setup)
        return setting.exits.enter_context(search)

    return build
