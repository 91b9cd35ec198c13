"""A single run of a search's winner, interrupted and resumed, comes to the search's own bits."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import run_single
from nanovlm import cli
from nanovlm.records import record_line
from nanovlm.results.read import answers_file
from tests.processes import start_command
from tests.programs.conftest import REPOSITORY, Finished, finish, start_program
from tests.programs.test_bad_input import code_and_message
from tests.records import make_record


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_best_configuration_interrupted_and_resumed_gives_the_bits_of_the_search(
    search: Finished, workplace: Path, no_ray_left: None
) -> None:
    # It is evaluated more often than in the search, which changes nothing at the end.
    arguments = ["--config", "results/digits/best.yaml", "eval_interval=20", "--name", "again"]
    folder = workplace / "results" / "again"
    process = start_program("run_single.py", *arguments, cwd=workplace)
    assert process.stdout is not None
    for line in process.stdout:
        if " samples, step " in line:
            os.killpg(process.pid, signal.SIGHUP)  # as a closed terminal sends it: to all of it
            break
    interrupted = finish(process, folder)
    assert interrupted.code == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    command = interrupted.output.splitlines()[-1]
    called = (sys.executable, str(REPOSITORY / "run_single.py"))
    assert shlex.split(command) == [*called, *arguments, "--resume"]
    assert interrupted.records == []

    resumed = finish(start_command(*shlex.split(command), cwd=workplace), folder)
    assert resumed.code == 0, resumed.output
    (record,) = resumed.records
    assert "goes on after" in (folder / "logs" / "group-0-rank-0.log").read_text()
    assert len(record.reports) > 1
    best = json.loads((search.folder / "summary.json").read_text())["best"]
    assert record.metrics == search.confirmed[best["trial_id"]].metrics
    weights, searched = (
        load_file(f / "best" / "model.safetensors") for f in (folder, search.folder)
    )
    assert weights.keys() == searched.keys()
    assert all(weights[name].equal(searched[name]) for name in weights)
    files = (answers_file(folder, record.trial_id), answers_file(search.folder, best["trial_id"]))
    assert len({file.read_bytes() for file in files}) == 1
    assert not list((folder / "checkpoints").glob("*.state"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "--resume: results/run does not exist; --name says where the run was"),
        ({"space.yaml": ""}, "--resume: results/run holds no single run to go on with"),
        (
            {"config.yaml": "{epochs: 9}"},
            "its config.yaml differs in lr_mp, ",
        ),
    ],
)
def test_a_run_that_cannot_go_on(
    files: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in files.items():
        (tmp_path / "results" / "run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / "run" / name).write_text(content)
    arguments = ["--preset", "digits", "lr_mp=1e-3", "seed=3", "--name", "run", "--resume"]
    code, said = code_and_message("run_single.py", arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert message in said


def test_a_job_that_is_begun_again_after_its_end_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "trials.jsonl").write_text(record_line(make_record(0, metrics={"val_loss": 1.0})))
    words = ["--preset", "digits", "--results", str(tmp_path), "--resume-if-exists"]
    monkeypatch.setattr("sys.argv", ["run_single.py", *words])
    assert run_single.main() == cli.DONE
    assert capsys.readouterr().out == f"the run in {folder} is over\n"
