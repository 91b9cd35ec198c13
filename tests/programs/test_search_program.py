"""A whole search through `run_search.py`, and what is in its results folder."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from nanovlm.config.sources import Layer, build_config, parse_overrides
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.results.read import answers_file
from tests.processes import output_of, start_command
from tests.programs.conftest import REPOSITORY, SMALL, SPACE, Finished

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_program_says_what_it_does(search: Finished) -> None:
    assert search.code == 0, search.output
    assert "Traceback" not in search.output
    lines = search.output.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("digits: "))
    head, searched, where, cluster, data = lines[begin : begin + 5]
    assert head.startswith("digits: trials of ") and "compared at" in head
    assert searched == (
        "searched: lr_mp, lr_backbones, batch_size; objective: mmstar_accuracy (lmms-eval-0.7.2); "
        "budget: 6 trials; 1 at once"
    )
    assert where == "results: results/digits"
    assert cluster.startswith("own Ray cluster, dashboard: http://127.0.0.1:")
    assert "ray get-auth-token" in cluster
    assert data.startswith("data: ")
    assert (
        sum(re.match(r"trial \d+ +(completed|stopped) ", line) is not None for line in lines) == 6
    )
    assert sum(line.startswith("confirm ") for line in lines) == 2
    told = [line for line in lines if " samples/s, data " in line and " paused " not in line]
    assert len(told) == 6 + 2
    assert "ended: budget.trials: 6 trials are done" in lines
    assert "report: results/digits/report.html" in lines
    assert lines[-1] == "python run_single.py --config results/digits/best.yaml"


def test_trials_are_recorded_in_full(search: Finished) -> None:
    records = search.records
    assert sorted(record.number for record in records) == list(range(6))
    assert {record.state for record in records} == {"completed", "stopped"}
    for record in records:
        assert record.first_step_at and record.ended_at
        assert record.submitted_at < record.first_step_at < record.ended_at
        assert record.worker_group == "group-0"
        seen = [report.samples_seen for report in record.reports]
        assert seen == sorted(seen)
        assert seen[-1] == record.samples_seen
        for report in record.reports:
            assert {"mmstar_accuracy", "val_loss", "train_loss"} <= set(report.metrics)
            assert report.speed and report.speed.samples_per_second > 0
            assert 0 < report.evaluation_seconds < report.seconds
        if record.state == "stopped":
            assert "is number" in str(record.reason)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space(REPOSITORY / SPACE[1], parse_overrides(SMALL))


def test_reports_are_made_at_the_milestones(search: Finished, space: SearchSpace) -> None:
    full = max(record.samples_seen for record in search.records)
    first = search.records[0].reports[0].samples_seen
    assert full // 9 <= first <= full // 9 + space.batch_sizes()[1]


def test_the_default_configuration_is_trial_0(search: Finished, space: SearchSpace) -> None:
    (default,) = (record for record in search.records if record.number == 0)
    assert dict(default.parameters) == space.default_values()
    assert build_config(Layer("trials.jsonl", dict(default.config))) == space.base


def test_the_resolved_space_is_kept(search: Finished, space: SearchSpace) -> None:
    assert load_space(search.folder / "space.yaml").differences(space) == []


def test_the_summary(search: Finished) -> None:
    summary = json.loads((search.folder / "summary.json").read_text())
    best = max(
        (record for record in search.records if record.state == "completed"),
        key=lambda record: record.metrics["mmstar_accuracy"],
    )
    assert summary["name"] == "digits"
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
    confirmed = {f"{run}.jsonl" for run in search.confirmed}
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
        "paused.jsonl",
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
    shown = json.loads((search.folder / "summary.json").read_text())["best"]["trial_id"]
    kept = {path.name: path for path in (search.folder / "checkpoints").iterdir()}
    assert kept.keys() == {best.trial_id, shown}
    model = "model.safetensors"
    assert (kept[shown] / model).samefile(search.folder / "best" / model), "it takes no disk"


def test_the_saved_model_answers(search: Finished, workplace: Path) -> None:
    command = (sys.executable, "-m", "nanovlm", "generate", "--checkpoint", "results/digits/best")
    question = ("--image", "digit.png", "--prompt", "Which digit is this?")
    process = start_command(*command, *question, cwd=workplace, PYTHONPATH=str(REPOSITORY))
    answer = output_of(process)
    assert process.returncode == 0, answer
    assert len(answer.splitlines()) == 1
