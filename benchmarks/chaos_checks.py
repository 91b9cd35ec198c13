"""What has to hold of a search that `chaos.py` has disturbed, and how long its slots were idle."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil

from benchmarks.killed import read_lines
from nanovlm.cluster.relay import NUMBER, VALUES
from tests.raylets import WORKER, Node, Raylets

BUSY_SHARE = 0.03
"""Of a CPU that a worker takes; one that waits for a job takes less than 0.01."""

_TIME = len("2026-01-01 00:00:00,000")
_LINE = re.compile(
    r"trial (?P<id>trial-\d+) (?P<what>starts|goes on after|reports at)(?: (?P<n>\d+))?"
)


def logged(results: Path) -> list[tuple[str, str, int]]:
    """Return what the workers' logs tell of trials, in order: id, what it did, samples seen."""
    lines = [
        line
        for path in sorted((results / "logs").glob("group-*-rank-0.log"))
        for line in path.read_text(errors="replace").splitlines()
    ]
    lines.sort(key=lambda line: line[:_TIME])  # of one time they stay as they stand in their file
    found = (_LINE.search(line) for line in lines)
    return [(m["id"], m["what"], int(m["n"] or 0)) for m in found if m]


@dataclass
class IdleMeter:
    """How long each node stood without work while there was some, by looking each second.

    A node works while a worker on it has begun a trial and takes time of the CPU. So the start of
    workers counts as idle.
    """

    cluster: Raylets
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds, by the address of the node, and `all` for all of them together."""
    _since: dict[str, float] = field(default_factory=dict)  # begin of the idleness that lasts
    _excused: dict[str, float] = field(default_factory=dict)  # until then
    _seconds: dict[psutil.Process, float] = field(default_factory=dict)  # of the CPU, at `_last`
    _last: float = field(default_factory=time.monotonic)

    def excuse(self, node: Node, seconds: float) -> None:
        """Do not count a node for so long."""
        self._excused[node.address] = time.monotonic() + seconds

    def look(self, nodes: list[Node], is_search_up: bool, has_new_trials: bool) -> None:
        """Count idle nodes.

        Args:
            nodes: that are alive and run trials.
            is_search_up: whether a search has begun to give them work.
            has_new_trials: whether it has trials that have not begun, so that no node need wait.
        """
        now = time.monotonic()
        used = {node.address: self._share_used(node, now - self._last) for node in nodes}
        self._last = now
        idle = {address for address, share in used.items() if share < BUSY_SHARE}
        idle = {address for address in idle if self._excused.get(address, 0) < now}
        counted = idle if has_new_trials else set[str]()
        if nodes and len(idle) == len(used):
            counted = counted | {"all"}
        self._since = {a: self._since.get(a, now) for a in counted} if is_search_up else {}
        for address, since in self._since.items():
            self.longest[address] = max(self.longest.get(address, 0.0), now - since)

    def _share_used(self, node: Node, seconds: float) -> float:
        """Return the share of a CPU that workers with a trial have used since the last look."""
        used = 0.0
        for process in node.processes(f"ray::{WORKER}"):
            try:
                if has_begun_a_trial(process):
                    times = process.cpu_times()
                    total = times.user + times.system
                    used += total - self._seconds.get(process, total)
                    self._seconds[process] = total
            except psutil.NoSuchProcess:
                continue
        return used / max(seconds, 0.001)


def has_begun_a_trial(process: psutil.Process) -> bool:
    """Workers open their log at their first line, which is that they start a trial."""
    return any(re.search(r"/group-\d+-rank-\d+\.log$", f.path) for f in process.open_files())


def problems_of(whole: Path, disturbed: Path, url: str, num_trials: int) -> Iterator[str]:
    """Return in what a disturbed search differs from the undisturbed one, and `problems_in` it."""
    yield from problems_in(disturbed, num_trials)
    yield from _configurations_differ(whole, disturbed)
    yield from _reports_differ(whole, disturbed)
    yield from _trials_failed(whole, disturbed)
    yield from _told_wrongly(disturbed, url, num_trials)


def problems_in(results: Path, num_trials: int) -> Iterator[str]:
    """Return all that is wrong with the files of a search that was disturbed."""
    yield from _trials_missing_or_twice(results, num_trials)
    yield from _decided_twice(results)
    yield from _began_behind(results)
    yield from _left_over(results)


def _by_number(folder: Path) -> dict[int, dict[str, Any]]:
    return {trial["number"]: trial for trial in read_lines(folder / "trials.jsonl")}


def _trials_missing_or_twice(folder: Path, num_trials: int) -> Iterator[str]:
    counts = Counter(trial["number"] for trial in read_lines(folder / "trials.jsonl"))
    if missing := sorted(set(range(num_trials)) - counts.keys()):
        yield f"trials without an end: {missing}"
    if unknown := sorted(counts.keys() - set(range(num_trials))):
        yield f"trials beyond {num_trials}: {unknown}"
    if twice := sorted(number for number, count in counts.items() if count > 1):
        yield f"trials that stand twice in trials.jsonl: {twice}"


def _configurations_differ(whole: Path, disturbed: Path) -> Iterator[str]:
    expected, found = _by_number(whole), _by_number(disturbed)
    for number in sorted(expected.keys() & found.keys()):
        if expected[number]["config"] != found[number]["config"]:
            yield f"trial {number} has another configuration than in the undisturbed search"


def _reports_differ(whole: Path, disturbed: Path) -> Iterator[str]:
    """Trials may end at other milestones, since trials beside each other decide that; what both
    have reached has to be the same to the last bit."""
    expected, found = _by_number(whole), _by_number(disturbed)
    for number in sorted(expected.keys() & found.keys()):
        metrics = {r["samples_seen"]: r["metrics"] for r in expected[number]["reports"]}
        seen = [report["samples_seen"] for report in found[number]["reports"]]
        if sorted(set(seen)) != seen:
            yield f"trial {number} has reports at {seen}"
        for report in found[number]["reports"]:
            at = report["samples_seen"]
            if metrics.get(at, report["metrics"]) != report["metrics"]:
                yield f"trial {number} has other metrics at {at} samples than undisturbed"


def _trials_failed(whole: Path, disturbed: Path) -> Iterator[str]:
    expected = _by_number(whole)
    for number, trial in sorted(_by_number(disturbed).items()):
        if trial["state"] == "failed" and expected.get(number, trial)["state"] != "failed":
            yield f"trial {number} failed: {trial['reason']}"


def _decided_twice(folder: Path) -> Iterator[str]:
    decisions = (line for line in read_lines(folder / "rungs.jsonl") if "milestone" in line)
    kinds = Counter((d["number"], d["milestone"], json.dumps(d, sort_keys=True)) for d in decisions)
    if twice := sorted({key[:2] for key, count in kinds.items() if count > 1}):
        yield f"decisions that stand twice in rungs.jsonl (trial, milestone): {twice}"


def _told_wrongly(folder: Path, url: str, num_trials: int) -> Iterator[str]:
    """The study has each trial once, ended, with the value of trials.jsonl. What was created and
    never got its values, since the program or the database went away, has ended too."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.load_study(study_name=folder.name, storage=url).trials
    told: dict[int, list[optuna.trial.FrozenTrial]] = {}
    for trial in trials:
        if VALUES in trial.user_attrs:
            told.setdefault(trial.user_attrs[NUMBER], []).append(trial)
    if missing := sorted(set(range(num_trials)) - told.keys()):
        yield f"trials that the study lacks: {missing}"
    if twice := sorted(number for number, found in told.items() if len(found) > 1):
        yield f"trials that the study has twice: {twice}"
    if running := [t.user_attrs.get(NUMBER) for t in trials if not t.state.is_finished()]:
        yield f"trials that have not ended in the study: {running}"
    for number, record in _by_number(folder).items():
        for trial in told.get(number, []):
            if record["state"] == "completed" and trial.value != _objective(record["metrics"]):
                yield f"trial {number} has the value {trial.value} in the study"


def _objective(metrics: Mapping[str, float]) -> float:
    return metrics["mmstar_accuracy"]


def _began_behind(folder: Path) -> Iterator[str]:
    """A trial goes on from its last report, whichever group takes it up."""
    finals = {n: t["reports"][-1] for n, t in _by_number(folder).items() if t["reports"]}
    ends = {f"trial-{n:04d}": r["samples_seen"] for n, r in finals.items() if r["is_final"]}
    reported: dict[str, int] = {}
    starting: dict[str, bool] = {}
    for trial_id, what, samples in logged(folder):
        last = reported.get(trial_id, 0)
        if what == "starts":
            starting[trial_id] = True
        elif what == "goes on after":
            starting[trial_id] = False
            if samples < last:
                yield f"{trial_id} went on after {samples} samples, though it had reported {last}"
        else:
            if starting.pop(trial_id, False) and last:
                yield f"{trial_id} began again, though it had reported at {last} samples"
            if samples != ends.get(trial_id):  # a final report is made again if it was not recorded
                reported[trial_id] = max(last, samples)


def _left_over(folder: Path) -> Iterator[str]:
    states = sorted(path.name for path in (folder / "checkpoints").glob("*state*"))
    if states:
        yield f"training states of trials that have ended: {states}"
