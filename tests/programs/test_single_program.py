"""A single run that is interrupted goes on from its last report, to the same bits."""

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanovlm.config_files import load_config, parse_overrides
from nanovlm.distributed.single import plan_single
from nanovlm.messages import Job, Report
from nanovlm.resources import Resources
from nanovlm.trial import run_trial
from tests.programs.conftest import finish, start_program
from tests.programs.test_bad_input import code_and_message

ARGUMENTS = ("--preset", "digits", "data_cutoff_idx=300", "epochs=4", "lr_mp=1e-3", "seed=3")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_and_resume_give_the_run_that_was_not_disturbed(tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--name", "run"]
    folder = tmp_path / "results" / "run"
    process = start_program("run_single.py", *arguments, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if " samples, step " in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    interrupted = finish(process, folder)
    assert interrupted.code == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    command = interrupted.output.splitlines()[-1]
    assert command == f"python run_single.py {' '.join(arguments)} --resume"
    assert interrupted.records == []

    resumed = finish(start_program(*command.split()[1:], cwd=tmp_path), folder)
    assert resumed.code == 0, resumed.output
    (record,) = resumed.records
    whole = undisturbed(tmp_path / "whole")
    assert [(r["samples_seen"], r["metrics"]) for r in record.reports] == [
        (report.samples_seen, report.metrics) for report in whole
    ]
    folders = (folder / "best", tmp_path / "whole")
    weights = [load_file(path / "model.safetensors") for path in folders]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    assert not list((folder / "checkpoints").glob("*.state"))


def undisturbed(output_dir: Path) -> list[Report]:
    """Return the reports of the same trial, run here without Ray."""
    config = load_config(None, "digits", parse_overrides(ARGUMENTS[2:]))
    plan = plan_single(config)
    job = Job(
        trial_id="whole",
        config=plan.config,
        milestones=plan.milestones,
        output_dir=str(output_dir),
    )
    reports = list(run_trial(job, Resources("cpu")))
    assert len(reports) == 4
    return reports


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "--resume: results/run does not exist; --name says where the run was"),
        ({"space.yaml": ""}, "--resume: results/run holds no single run to go on with"),
        ({"config.yaml": "{epochs: 9}"}, "has another configuration; it differs in lr_mp, "),
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
    arguments = [*ARGUMENTS, "--name", "run", "--resume"]
    code, said = code_and_message("run_single.py", arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert message in said
