"""Makes results folders as a search leaves them, without training: realistic numbers, real files.

make_results(tmp_path / "search", num_trials=24)
"""

import dataclasses
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.parameter import Parameter
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import End, Kind, Leg, Report, TrialRecord
from nanovlm.results.read import DATA_FILE, SPACE_FILE, answers_file
from nanovlm.results.retention import model_dir
from nanovlm.results.write import ResultsStore
from tests.records import make_record, make_report, make_speed, one_leg
from tests.results.answers import write_answers

SPACE = """
preset: digits
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  freeze: default
  lr_backbones: {log_uniform: [1.0e-5, 1.0e-2], when: {freeze: [none, vision_encoder]}}
  batch_size: {choice: [16, 32, 64]}
  weight_decay: default
  warmup_ratio: {uniform: [0.0, 0.1]}
scheduler: {name: asha, rungs: 3, reduction_factor: 3}
budget: {trials: 24}
confirm: {top: 1, seeds: 2}
"""
MILESTONES = (1000, 3000)
FULL = 9000
SIZES = {"coarse perception": 250, "math": 150, "science & technology": 200}
NUM_ITEMS = sum(SIZES.values())
DATA = {
    "training": {
        "rows": 3000,
        "samples": 9000,
        "subsets": {"ai2d": {"rows": 3000, "over_long_turns": 7, "samples": 9000}},
        "bad_rows": [],
    },
    "benchmark": {"samples": NUM_ITEMS},
}
BEGIN = 1_790_000_000.0
NUM_GROUPS = 4
FAILURE = "CUDA out of memory: tried to allocate 2.00 GiB\nsecond line"


def make_results(
    folder: Path,
    *,
    num_trials: int = 24,
    ended_by: str | None = "budget.trials: all trials are done",
    space: str = SPACE,
    failure: str = FAILURE,
    confirms: bool = True,
) -> Path:
    """Make the results folder of a search; return it.

    Args:
        ended_by: None leaves it as it is while the search runs, with one more trial under way.
        failure: the reason of every seventh trial, which fails.
        confirms: whether the best and the default configuration run again.
    """
    search = _Search(_space(space), num_trials, failure)
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), gpus_per_trial=0)
    with store.opened(resume=False):
        store.begin()
        store.write_text(SPACE_FILE, search.space.to_yaml())
        store.write_json(DATA_FILE, DATA)
        for record in sorted(search.records, key=lambda r: r.ended_at or 0.0):
            store.take(record)
        running = [] if ended_by else [_verdict(num_trials, 1000, 0.61, True, None)]
        lines = [json.dumps(verdict) for verdict in [*search.verdicts, *running]]
        store.write_text("rungs.jsonl", "".join(f"{line}\n" for line in lines))
        for run in search.confirming_runs() if confirms else []:
            _write_answers(folder, run)
            model_dir(folder, run.trial_id).mkdir(parents=True)
            store.take(run)
        if ended_by is None:
            store.write_summary(600.0)
        else:
            store.close(600.0, ended_by, is_settled=True)
    return folder


def add_paused(folder: Path, numbers: Sequence[int]) -> None:
    """Let further trials wait in a search: all at the first milestone but the last one, which went
    on there and waits at the second one."""
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), gpus_per_trial=0)
    with store.opened(resume=True), (folder / "rungs.jsonl").open("a") as rungs:
        begin = 20 + max(record.ended_at or 0.0 for record in (*store.records, *store.confirmed))
        for index, number in enumerate(numbers):
            legs = [Leg(worker_group="group-0", first_step_at=begin + 0.2, ended_at=begin + 4)]
            reports = [_report(1000, 0.4 + index / 100, 4.0)]
            lines = [_verdict(number, 1000, 0.4 + index / 100, False, 0.5)]
            if number == numbers[-1]:
                legs.append(
                    Leg(worker_group="group-1", first_step_at=begin + 9, ended_at=begin + 17)
                )
                reports.append(_report(3000, 0.7, 12.0))
                lines += [
                    _verdict(number, 1000, 0.45, True, 0.5),
                    _verdict(number, 3000, 0.7, False, 0.8),
                ]
            record = make_record(
                number,
                "paused",
                reports=reports,
                legs=tuple(legs),
                parameters=store.records[0].parameters,
                submitted_at=begin,
                worker_group=legs[-1].worker_group,
            )
            rungs.writelines(
                f"{json.dumps(line | {'is_paused': not line['goes_on']})}\n" for line in lines
            )
            store.take(record)
            begin += 5
        store.close(700.0, "interrupted")


def make_single(folder: Path) -> Path:
    """Make the results folder of a single run; return it."""
    search = _Search(_space(SPACE), 1, FAILURE)
    record = dataclasses.replace(search.records[0], parameters={})
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), gpus_per_trial=0)
    with store.opened(resume=False):
        store.begin()
        store.write_json(DATA_FILE, DATA)
        store.take(record)
        store.close(60.0, "completed")
    return folder


class _Search:
    """A search whose trials are made up, one after another, as a scheduler would stop them."""

    def __init__(self, space: SearchSpace, num_trials: int, failure: str) -> None:
        self.space = space
        self.verdicts: list[dict[str, Any]] = []
        self._failure = failure
        self._random = random.Random(0)
        self._rungs: dict[int, list[float]] = {milestone: [] for milestone in MILESTONES}
        self._free_at = [BEGIN + 12.0] * NUM_GROUPS
        self.records = [self._trial(number) for number in range(num_trials)]

    def confirming_runs(self) -> list[TrialRecord]:
        """Return two runs of the best and of the default trial."""
        full = [record for record in self.records if record.state == "completed"]
        best = max(full, key=lambda record: record.metrics["mmstar_accuracy"])
        return [self._confirming(trial, seed) for seed in (1, 2) for trial in (best, full[0])]

    def _confirming(self, trial: TrialRecord, seed: int) -> TrialRecord:
        start = min(self._free_at)
        accuracy = trial.metrics["mmstar_accuracy"] + self._random.gauss(0, 0.004)
        reports = [_report(FULL, accuracy, 40.0)]
        return self._ended(
            dataclasses.replace(
                trial,
                trial_id=f"confirm-{trial.number}-seed-{seed}",
                kind=Kind.CONFIRM,
                config={**trial.config, "seed": seed},
            ),
            start,
            reports,
        )

    def _trial(self, number: int) -> TrialRecord:
        values = self.space.default_values() if number == 0 else self._draw()
        record = make_record(
            number,
            parameters=values,
            config=config_values(self.space.config_for(values)),
            submitted_at=min(self._free_at) - 0.05 if number >= NUM_GROUPS else BEGIN,
        )
        start = min(self._free_at)
        if number % 7 == 6:
            failed = self._ended(record, start, [])
            return dataclasses.replace(failed, end=End.ERROR, reason=self._failure)
        reports: list[Report] = []
        for samples in (*MILESTONES, FULL):
            accuracy = _accuracy(values, samples) + self._random.gauss(0, 0.01)
            reports.append(_report(samples, accuracy, 40.0 * samples / FULL))
            reason = self._decide(number, samples, reports[-1].metrics["mmstar_accuracy"])
            if reason:
                stopped = self._ended(record, start, reports)
                return dataclasses.replace(stopped, end=End.PRUNED, reason=reason)
        return self._ended(record, start, reports)

    def _decide(self, number: int, samples: int, value: float) -> str | None:
        """Return why a trial is stopped at a milestone, None if it goes on."""
        if samples == FULL:
            return None
        rung = self._rungs[samples]
        cutoff = sorted(rung)[math.floor(len(rung) * 2 / 3)] if rung else None
        rung.append(value)
        verdict = _verdict(number, samples, value, cutoff is None or value >= cutoff, cutoff)
        self.verdicts.append(verdict)
        return None if verdict["goes_on"] else verdict["reason"]

    def _ended(self, record: TrialRecord, start: float, reports: Sequence[Report]) -> TrialRecord:
        group = self._free_at.index(start)
        first, seconds = start + 0.2, reports[-1].seconds if reports else 3.0
        self._free_at[group] = start + seconds
        ended = dataclasses.replace(
            record,
            reports=tuple(reports),
            first_step_at=first if reports else None,
            ended_at=start + seconds,
            worker_group=f"group-{group}",
            legs=(),
        )
        return one_leg(ended)

    def _draw(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in self.space.parameters:
            if parameter.is_active(values):
                values[parameter.key] = self._value(parameter)
        return values

    def _value(self, parameter: Parameter) -> Any:
        if parameter.kind == "choice":
            return self._random.choice(parameter.values)
        low, high = map(float, parameter.values)  # type: ignore[arg-type]
        if parameter.kind.startswith("log_"):
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return self._random.uniform(low, high)


def _space(text: str) -> SearchSpace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.yaml"
        path.write_text(text, encoding="utf-8")
        return load_space(path)


def _accuracy(values: Mapping[str, Any], samples: int) -> float:
    """Return what a configuration reaches: a hill over the learning rate, climbed with samples."""
    distance = abs(math.log10(values.get("lr_mp", 1e-3)) + 2)
    top = 0.9 - 0.18 * distance - 0.05 * (values.get("freeze") == "backbones")
    return 0.25 + (top - 0.25) * (1 - math.exp(-3 * samples / FULL))


def _report(samples: int, accuracy: float, seconds: float) -> Report:
    right = {name: round(min(0.99, accuracy) * size) for name, size in SIZES.items()}
    right["math"] = max(1, right["math"] - 15)
    metrics = {
        "mmstar_accuracy": sum(right.values()) / NUM_ITEMS,
        "mmstar_num_items": float(NUM_ITEMS),
        "val_loss": 1.4 - accuracy,
        "train_loss": 1.3 - accuracy,
    }
    for name, size in SIZES.items():
        metrics[f"mmstar_accuracy/{name}"] = right[name] / size
        metrics[f"mmstar_accuracy/{name}/all of it"] = right[name] / size
    return make_report(
        samples,
        metrics,
        step=samples // 32,
        seconds=seconds,
        evaluation_seconds=1.0,
        speed=make_speed(samples_per_second=230.0),
    )


def _verdict(
    number: int, milestone: int, value: float, goes_on: bool, cutoff: float | None
) -> dict[str, Any]:
    reason = "compared with nothing here" if cutoff is None else "no worse than the cutoff"
    if not goes_on:
        reason = f"mmstar_accuracy {value:.4g} below {cutoff:.4g}, the cutoff at {milestone}"
    return {
        "number": number,
        "milestone": milestone,
        "samples_seen": milestone,
        "value": value,
        "goes_on": goes_on,
        "reason": reason,
        "cutoff": cutoff,
    }


def _write_answers(folder: Path, run: TrialRecord) -> None:
    right = round(run.metrics["mmstar_accuracy"] * NUM_ITEMS)
    answers = {index: index < right for index in range(NUM_ITEMS)}
    write_answers(answers_file(folder, run.trial_id), answers)
