"""The one command for a machine with a GPU: its time boxes, what a stage can do to the others, and
the rehearsal on a CPU."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks import on_gpu, profiles, train_step, whole_search
from benchmarks.on_gpu import STAGES, Stage, chosen, command, run_stages, shown
from benchmarks.sides import PeerSide, Run
from benchmarks.stage_runner import MAX_LOG_BYTES, Ending, Outcome, shorten, time_box
from nanovlm.config.schema import TrainConfig
from nanovlm.training.passes import MicroBatchSize
from tests.records import make_record, make_report, make_speed

REPOSITORY = Path(__file__).parents[1]
IMPORTS = "import argparse, json, pathlib, subprocess, sys, time\n"
WRITES = """
parser = argparse.ArgumentParser()
parser.add_argument("--json", type=pathlib.Path)
out = parser.parse_args().json
"""
GOOD = f"{IMPORTS}{WRITES}out.write_text(json.dumps({{'answer': 42}}))"
WITH_DAEMON = f"""{IMPORTS}{WRITES}
daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
out.write_text(json.dumps({{"daemon": daemon.pid}}))
"""
FAILING = f"{WITH_DAEMON}raise ValueError('no luck')"
HANGING = f"""{WITH_DAEMON}
def wait_for_ever():
    time.sleep(1000)
wait_for_ever()
"""


def test_what_a_stage_leaves_over_goes_to_the_next() -> None:
    shares = (1, 2, 5)
    assert time_box(shares, 0, 80, spent=0) == 10
    assert time_box(shares, 1, 80, spent=10) == 20
    assert time_box(shares, 1, 80, spent=4) == 26
    assert time_box(shares, 2, 80, spent=30) == 50
    assert time_box(shares, 2, 80, spent=79) == 1


def made_up(folder: Path, name: str, code: str, share: float, least_seconds: float = 0) -> Stage:
    script = folder / f"{name}.py"
    script.write_text(code)
    return Stage(name, share, least_seconds, str(script), "", "", ("answer: the answer is {}",))


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_costs_only_itself(tmp_path: Path) -> None:
    stages = [
        made_up(tmp_path, "fails", FAILING, 10),
        made_up(tmp_path, "hangs", HANGING, 0),
        made_up(tmp_path, "too_late", GOOD, 0, least_seconds=5),
        made_up(tmp_path, "good", GOOD, 50),
    ]
    out = tmp_path / "out"
    out.mkdir()
    fails, hangs, too_late, good = run_stages(stages, out, minutes=1, rehearse=True)
    assert (fails.ending, fails.exit_code) == ("failed", 1)
    assert not is_alive(fails.figures["daemon"])
    assert fails.tail[-1] == "ValueError: no luck"
    assert hangs.ending == "out of time"
    assert not is_alive(hangs.figures["daemon"])
    assert any("in wait_for_ever" in line for line in hangs.tail)
    assert (too_late.ending, too_late.exit_code) == ("skipped", None)
    assert (good.ending, good.figures) == ("fine", {"answer": 42})
    kept = json.loads((out / "results.json").read_text())["stages"]
    assert [stage["ending"] for stage in kept] == ["failed", "out of time", "skipped", "fine"]
    rows = (out / "table.md").read_text().splitlines()[4:]
    assert "| failed |" in rows[0] and "`ValueError: no luck`" in rows[0]
    assert "the answer is 42" in rows[3]
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "table.md"]


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_logs_of_daemons_are_kept_when_a_stage_fails(tmp_path: Path) -> None:
    code = "import os, pathlib\npathlib.Path(os.environ['TMPDIR'], 'raylet.err').write_text('hm')"
    stage = made_up(tmp_path, "fails", f"{code}\n1 / 0", 1)
    run_stages([stage], tmp_path, minutes=1, rehearse=True)
    log = (tmp_path / "log.txt").read_text()
    assert "ZeroDivisionError" in log and "--- raylet.err\nhm\n" in log


def test_the_log_of_a_run_stays_small(tmp_path: Path) -> None:
    stage = made_up(tmp_path, "talks", f"print('x' * {2 * MAX_LOG_BYTES})\nprint('the end')", 1)
    run_stages([stage, stage], tmp_path, minutes=1, rehearse=True)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("the end") == 2 and len(log) < 2 * MAX_LOG_BYTES + 100


def test_a_log_without_end_is_shortened(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"before" + b"a" * MAX_LOG_BYTES + b"z" * MAX_LOG_BYTES)
    shorten(log, begin=6)
    text = log.read_bytes()
    assert text.startswith(b"beforeaaa") and text.endswith(b"zzz")
    assert len(text) < MAX_LOG_BYTES + 20


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_programs_take_the_arguments_of_their_stage(
    stage: Stage, rehearse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(stage, rehearse, device_stage("fine", {"compile_obstacle": "no compiler"}))
    monkeypatch.setattr(sys, "argv", [*words[1:], "--json", "figures.json"])
    program = importlib.import_module(f"benchmarks.{Path(words[1]).stem}")
    arguments = program.parse_arguments()
    assert arguments.json == Path("figures.json")
    assert not (stage.is_compiled and arguments.compile)
    assert getattr(arguments, "measured_tflops", 700) == 700


def device_stage(ending: Ending, figures: dict[str, Any]) -> Outcome:
    return Outcome(1, "device", (), 9.0, ending, figures={on_gpu.CEILING: 700.0, **figures})


def test_nothing_is_compiled_where_the_first_stage_has_not_found_that_it_can_be() -> None:
    stage = next(stage for stage in STAGES if stage.name == "training")
    fine, none = {"compile_obstacle": None}, dict[str, Any]()
    for device in (None, device_stage("failed", fine), device_stage("out of time", none)):
        assert "--no-compile" not in command(stage, False, device)
        assert "--no-compile" in command(stage, False, device, compiled=False)
    for device in (device_stage("failed", none), device_stage("fine", {"compile_obstacle": "x"})):
        assert "--no-compile" in command(stage, False, device)


def test_shares_are_seconds_of_ten_minutes() -> None:
    assert sum(stage.share for stage in STAGES) == 600
    assert all(stage.least_seconds < stage.share for stage in STAGES)


def test_stages_are_chosen_by_name_or_number() -> None:
    assert [stage.name for stage in chosen("training, 1")] == ["device", "training"]
    with pytest.raises(argparse.ArgumentTypeError, match="no stage 'none'; there are device, "):
        chosen("device,none")


def test_figures_are_shown_where_they_are_there() -> None:
    figures = {"a": 0.5, "none": None, "222m": {"losses": {"cpu": {"x": 1}, "cuda": {"x": 2}}}}
    assert shown("a: {:.0%} of it", figures) == ["50% of it"]
    assert shown("*.losses.*.x: within {:.1f}", figures) == ["within 1.0", "within 2.0"]
    assert shown("none: {:.1f}", figures) == shown("missing.a: {:.1f}", figures) == []


def run_gpu_tests(folder: Path, code: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the figures of the stage `tests` on a file of tests."""
    folder.mkdir()
    (folder / "test_it.py").write_text(f"import pytest\n\npytestmark = pytest.mark.gpu\n{code}")
    (folder / "test_other.py").write_text("raise ImportError('a package that is not there')")
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_tests.py")]
    program += ["--tests", str(folder), "--json", str(folder / "figures.json")]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    return done.returncode, json.loads((folder / "figures.json").read_text())


def test_what_became_of_each_gpu_test_is_told(tmp_path: Path) -> None:
    code, figures = run_gpu_tests(
        tmp_path / "mixed",
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n",
    )
    counts = [figures[name] for name in ("collected", "passed", "failed", "skipped")]
    assert (code, counts) == (1, [3, 1, 1, 1])
    ((name, lines),) = figures["failures"].items()
    assert name.endswith("::test_bad") and any("one is not two" in line for line in lines)
    code, figures = run_gpu_tests(tmp_path / "skipped", "def test_it(): pytest.skip()")
    assert (code, figures["skipped"]) == (1, 1)  # on a GPU that is no success


def test_gaps_between_kernels_are_idle() -> None:
    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("kernel", "gemm", 0, 10),
        event("kernel", "gemm", 5, 15),  # on another stream
        event("gpu_memcpy", "copy", 30, 10),
        event("gpu_user_annotation", "the whole step", 0, 100),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        event("cuda_driver", "cuLaunchKernelEx", 2, 1),
        {"ph": "M", "name": "process_name"},
    ]
    found = profiles.gpu_activity(events, num_steps=2)
    assert found["gpu_idle_fraction"] == pytest.approx(1 - 30 / 40)
    assert (found["kernels_a_step"], found["launches_a_step"]) == (1, 1)
    assert found["longest_kernels"] == [
        {"name": "gemm", "milliseconds_a_step": 0.0125, "calls_a_step": 1}
    ]
    assert set(profiles.gpu_activity(events[4:], 2).values()) == {None}


def test_the_peer_takes_the_half_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(side: PeerSide) -> Run:
        if side.batch_size > 2:
            raise torch.OutOfMemoryError
        return Run(1, 1.0, 0, 0)

    monkeypatch.setattr(PeerSide, "run", run)
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cpu", "--batch-size", "8"])
    arguments = train_step.parse_arguments()
    config = train_step.train_config("tiny", arguments)
    peer, texts = train_step.Peer(config.vlm), train_step.training_texts(config)
    side, _ = train_step.warm_peer(peer, config, texts, torch.device("cpu"), arguments)
    assert side.batch_size == 2


def record(number: int, group: str, first_step_at: float, ended_at: float, note: str = "") -> Any:
    speed = make_speed(samples_per_second=10.0 * number)
    return make_record(
        number,
        reports=[make_report(100, {}, speed=speed, notes=(note,))],
        first_step_at=first_step_at,
        ended_at=ended_at,
        worker_group=group,
    )


def test_what_a_search_came_to() -> None:
    records = [record(1, "a", 10, 20), record(2, "b", 15, 30), record(3, "a", 21, 26)]
    found = whole_search.findings(records, started_at=4)
    assert found["seconds_to_first_step"] == 6
    assert found["both_at_once_seconds"] == 11  # from 15 to 26
    assert found["turnaround_seconds"] == found["longest_turnaround_seconds"] == 1
    assert found["samples_per_second"] == 20
    assert whole_search.findings([], started_at=4)["seconds_to_first_step"] is None
    assert whole_search.both_at_once(records[::2]) == 0


def test_halves_are_seen_in_the_notes_of_the_trial_that_was_short_of_memory() -> None:
    notes: list[str] = []
    size = MicroBatchSize(torch.device("cuda"), notes.append)
    config = TrainConfig()
    assert size.halve(np.arange(8), config)
    halved = record(3, "a", 0, 1, notes[0])
    assert whole_search.has_halved([halved], 3) and not whole_search.has_halved([halved], 2)
    size.begin_trial()  # a later trial only knows of it
    assert not whole_search.has_halved([record(3, "a", 0, 1, notes[1])], 3)


def test_memory_that_grows_is_told_by_worker() -> None:
    lines = [(1, 5.0), (2, 7.0), (1, 5.5), (2, 7.25), (1, 5.25)]
    memory = [{"worker": worker, "after_gb": gigabytes} for worker, gigabytes in lines]
    assert whole_search.memory_growth(memory) == 0.5
    assert whole_search.memory_growth(memory[:2]) is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"states": ["completed"]}, "the trials ended so"),
        ({"states": ["completed", "failed"]}, "the trials ended so"),
        ({"has_report": False}, "no report.html"),
        ({"memory_growth_gb": 0.1}, "grew by 0.10 GB"),
        ({"halved": False}, "did not halve"),
        ({"broken": False}, "no GPU failed"),
        ({"both_at_once_seconds": 0.0}, "no trials ran at once"),
    ],
)
def test_what_is_wrong_with_a_search_is_told(changes: dict[str, Any], complaint: str) -> None:
    arguments = argparse.Namespace(trials=2, gpus=0.5, concurrency=2, broken=True)
    found = {"states": ["completed", "stopped"], "has_report": True, "memory_growth_gb": 0.0}
    found |= {"halved": True, "broken": True, "both_at_once_seconds": 3.0}
    assert whole_search.complaints(found, arguments) == []
    (told,) = whole_search.complaints({**found, **changes}, arguments)
    assert complaint in told


REHEARSED = ("device", "tests", "training", "profile", "mmstar", "start")
"""All but those that start Ray, which the tests of the programs do often enough."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_rehearsal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "on_gpu.py"), "--rehearse"]
    program += [
        "--no-compile",
        "--minutes",
        "30",
        "--out",
        str(out),
        "--stages",
        ",".join(REHEARSED),
    ]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()
    kept = json.loads((out / "results.json").read_text())["stages"]
    figures = {stage["name"]: stage["figures"] for stage in kept}
    assert tuple(figures) == REHEARSED
    assert figures["device"]["card"] is None and figures["device"][on_gpu.CEILING] > 0
    tests = figures["tests"]
    assert tests["collected"] == tests["skipped"] > 0 == tests["passed"] == tests["failed"]
    training = figures["training"]["tiny"]
    assert training["ratio"] > 0 and training["share_of_measured_product"] > 0
    assert training["losses"]["cpu"]["largest_difference"] < 1e-3
    assert training["model_flops_utilization"] is None and "peak_memory_gb" not in training
    assert figures["mmstar"]["tiny"]["stops"]["least_equal"] == 1
    assert figures["start"]["later_graphs"] == 0 < figures["start"]["later_seconds"]
    assert figures["profile"]["kernels_a_step"] is None
    assert any("aten::mm" in line for line in figures["profile"]["table"])
    assert all(row in done.stdout for row in (out / "table.md").read_text().splitlines())
