"""A whole search through `run_search.py`, and what is in its results folder."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from nanovlm.config_files import Layer, build_config
from nanovlm.messages import TrialRecord
from nanovlm.results.store import answers_file
from nanovlm.search.space import load_space
from tests.programs.conftest import (
    Finished,
    finish,
    run_program,
    start_program,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_program_says_what_it_does(search: Finished) -> None:
    assert search.code == 0, search.output
    assert "Traceback" not in search.output
    lines = search.output.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("space: "))
    head, searched, where, cluster, data = lines[begin : begin + 5]
    assert head.startswith("space: trials of ") and "compared at" in head
    assert searched == ("searched: lr_mp, lr_backbones, batch_size; budget: 6 trials; 1 at once")
    assert where == "results: results/demo"
    assert cluster.startswith("own Ray cluster, dashboard: http://127.0.0.1:")
    assert "ray get-auth-token" in cluster
    assert data.startswith("data: ")
    assert (
        sum(re.match(r"trial \d+ +(completed|stopped) ", line) is not None for line in lines) == 6
    )
    assert sum(line.startswith("confirm ") for line in lines) == 2
    assert sum(" samples/s, data " in line for line in lines) == 6 + 2
    assert "ended: budget.trials: 6 trials are done" in lines
    assert "report: results/demo/report.html" in lines
    assert lines[-1] == "python run_single.py --config results/demo/best.yaml"


def test_trials_are_recorded_in_full(search: Finished) -> None:
    records = search.records
    assert sorted(record.number for record in records) == list(range(6))
    assert {record.state for record in records} == {"completed", "stopped"}
    for record in records:
        assert record.first_step_at and record.ended_at
        assert record.submitted_at < record.first_step_at < record.ended_at
        assert record.worker_group == "group-0"
        seen = [report["samples_seen"] for report in record.reports]
        assert seen == sorted(seen)
        assert seen[-1] == record.samples_seen
        for report in record.reports:
            assert {"mmstar_accuracy", "val_loss", "train_loss"} <= set(report["metrics"])
            assert report["speed"]["samples_per_second"] > 0
            assert 0 < report["evaluation_seconds"] < report["seconds"]
        if record.state == "stopped":
            assert "the cutoff of" in str(record.reason)


def test_reports_are_made_at_the_milestones(search: Finished, workplace: Path) -> None:
    space = load_space(workplace / "space.yaml")
    full = max(record.samples_seen for record in search.records)
    first = search.records[0].reports[0]["samples_seen"]
    assert full // 9 <= first <= full // 9 + space.batch_sizes()[1]


def test_the_default_configuration_is_trial_0(search: Finished, workplace: Path) -> None:
    space = load_space(workplace / "space.yaml")
    (default,) = (record for record in search.records if record.number == 0)
    assert dict(default.parameters) == space.default_values()
    assert build_config(Layer("trials.jsonl", dict(default.config))) == space.base


def test_the_resolved_space_is_kept(search: Finished, workplace: Path) -> None:
    assert (
        load_space(search.folder / "space.yaml").differences(load_space(workplace / "space.yaml"))
        == []
    )


def test_the_summary(search: Finished) -> None:
    summary = json.loads((search.folder / "summary.json").read_text())
    best = max(
        (record for record in search.records if record.state == "completed"),
        key=lambda record: record.metrics["mmstar_accuracy"],
    )
    assert summary["name"] == "demo"
    assert summary["trials"]["total"] == 6
    confirmed = {c["number"]: c for c in summary["confirmation"]["configurations"]}
    assert best.number in confirmed and 0 in confirmed
    winner = confirmed[summary["confirmation"]["winner"]]
    assert winner["mean"] == max(c["mean"] for c in confirmed.values())
    assert summary["best"]["trial_id"] == winner["runs"][0]["trial_id"]
    low, high = summary["best"]["interval_95"]
    assert low < winner["mean"] < high
    assert summary["turnaround_seconds"]["median"] < 5  # promised: 0.5
    assert summary["training_seconds"] < summary["wall_seconds"]
    assert yaml.safe_load((search.folder / "best.yaml").read_text()) == summary["best"]["config"]
    assert summary["best"]["config"]["seed"] == 1, "a fresh one"


def test_every_trial_leaves_its_last_answers(search: Finished) -> None:
    names = {path.name for path in (search.folder / "answers").iterdir()}
    confirmed = {f"{run}.jsonl" for run in confirming_runs(search)}
    assert names == {f"{record.trial_id}.jsonl" for record in search.records} | confirmed
    for record in search.records:
        lines = answers_file(search.folder, record.trial_id).read_text().splitlines()
        right = [json.loads(line)["correct"] for line in lines]
        assert sum(right) / len(right) == record.metrics["mmstar_accuracy"]


def test_nothing_else_is_left(search: Finished) -> None:
    names = {path.name for path in search.folder.iterdir()}
    assert names == {
        "answers",
        "best",
        "best.yaml",
        "checkpoints",
        "confirm.jsonl",
        "data.json",
        "environment.json",
        "logs",
        "report.html",
        "rungs.jsonl",
        "space.yaml",
        "study.id",
        "study.journal",
        "summary.json",
        "tensorboard",
        "trials.jsonl",
    }
    best = max(
        (record for record in search.records if record.state == "completed"),
        key=lambda record: record.metrics["mmstar_accuracy"],
    )
    assert [path.name for path in (search.folder / "checkpoints").iterdir()] == [best.trial_id]


def confirming_runs(finished: Finished) -> dict[str, TrialRecord]:
    lines = (finished.folder / "confirm.jsonl").read_text().splitlines()
    runs = [TrialRecord(**json.loads(line)) for line in lines]
    return {run.trial_id: run for run in runs}


def test_the_best_configuration_run_alone_gives_the_same_bits(
    search: Finished, workplace: Path
) -> None:
    single = run_program(
        "run_single.py", "--config", "results/demo/best.yaml", cwd=workplace, name="again"
    )
    assert single.code == 0, single.output
    (record,) = single.records
    best = json.loads((search.folder / "summary.json").read_text())["best"]
    trial = confirming_runs(search)[best["trial_id"]]
    assert record.metrics == trial.metrics
    weights = load_file(single.folder / "best" / "model.safetensors")
    searched = load_file(search.folder / "best" / "model.safetensors")
    assert weights.keys() == searched.keys()
    assert all(weights[name].equal(searched[name]) for name in weights)
    answers = (answers_file(f.folder, r.trial_id) for f, r in ((single, record), (search, trial)))
    assert len({file.read_bytes() for file in answers}) == 1


def test_two_workers_give_the_loss_of_one(search: Finished, workplace: Path) -> None:
    arguments = ("--config", "results/demo/best.yaml", "--workers", "2")
    double = run_program("run_single.py", *arguments, cwd=workplace, name="double")
    assert double.code == 0, double.output
    (record,) = double.records
    best = json.loads((search.folder / "summary.json").read_text())["best"]
    for loss in ("train_loss", "val_loss"):
        assert record.metrics[loss] == pytest.approx(best["metrics"][loss], abs=1e-5)


def test_ctrl_c_and_resume_give_the_search_that_was_not_disturbed(
    search: Finished, workplace: Path, no_ray_left: None
) -> None:
    arguments = ["--space", "space.yaml", "--concurrency", "1", "--name", "disturbed"]
    folder = workplace / "results" / "disturbed"
    process = start_program("run_search.py", *arguments, cwd=workplace)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial 1"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of the program
            break
    interrupted = finish(process, folder)
    assert interrupted.code == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    command = interrupted.output.splitlines()[-1]
    assert command == f"python run_search.py {' '.join(arguments)} --resume"
    finished_before = interrupted.records
    assert {0, 1} <= {record.number for record in finished_before} < set(range(6))

    resumed = finish(start_program(*command.split()[1:], cwd=workplace), folder)
    assert resumed.code == 0, resumed.output
    assert resumed.records[: len(finished_before)] == finished_before
    assert outcomes(resumed) == outcomes(search)
    confirmed = [
        {name: run.metrics for name, run in confirming_runs(each).items()}
        for each in (resumed, search)
    ]
    assert confirmed[0] == confirmed[1]


def outcomes(finished: Finished) -> dict[int, tuple[object, ...]]:
    """Return what each trial was and came to, without times."""
    return {
        record.number: (record.parameters, record.state, record.reason, record.metrics)
        for record in finished.records
    }


def test_a_trial_that_fails_costs_the_others_nothing(workplace: Path) -> None:
    (workplace / "failing.yaml").write_text(FAILING_SPACE)
    finished = run_program(
        "run_search.py", "--space", "failing.yaml", cwd=workplace, name="failing"
    )
    assert finished.code == 0, finished.output
    by_rate: dict[float, set[str]] = {1e-3: set(), 1e30: set()}
    for record in finished.records:
        by_rate[record.parameters["lr_backbones"]].add(record.state)
        if record.state == "failed":
            assert "at step" in str(record.reason)
            assert record.reports == ()
    assert by_rate == {1e-3: {"completed"}, 1e30: {"failed"}}
    assert sorted(record.number for record in finished.records) == [0, 1, 2, 3, 4]


FAILING_SPACE = """
preset: digits
base: {data_cutoff_idx: 100, epochs: 1, lr_backbones: 1.0e-3}
search:
  lr_backbones: {choice: [1.0e-3, 1.0e+30]}
sampler: {name: random, seed: 1}
scheduler: {name: none}
budget: {trials: 5}
"""
