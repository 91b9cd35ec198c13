"""A single run that is interrupted goes on from its last report, to the same bits."""

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.programs.conftest import Finished, finish, run_program, start_program
from tests.programs.test_bad_input import code_and_message

ARGUMENTS = ("--preset", "digits", "data_cutoff_idx=300", "epochs=4", "lr_mp=1e-3", "seed=3")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_and_resume_give_the_run_that_was_not_disturbed(tmp_path: Path) -> None:
    whole = run_program("run_single.py", *ARGUMENTS, cwd=tmp_path, name="whole")
    assert whole.code == 0, whole.output
    reports = [line for line in whole.output.splitlines() if " samples, step " in line]
    assert len(reports) == 4

    arguments = [*ARGUMENTS, "--name", "parts"]
    folder = tmp_path / "results" / "parts"
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
    assert numbers(resumed) == numbers(whole)
    weights = [load_file(f.folder / "best" / "model.safetensors") for f in (resumed, whole)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    assert {path.name for path in folder.iterdir()} == {p.name for p in whole.folder.iterdir()}


def numbers(finished: Finished) -> list[tuple[object, object]]:
    (record,) = finished.records
    return [(report["samples_seen"], report["metrics"]) for report in record.reports]


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
