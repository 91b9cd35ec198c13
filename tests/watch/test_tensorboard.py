"""Event files of TensorBoard, read back record by record."""

import shutil
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

from nanovlm.messages import TrialRecord
from nanovlm.watch.tensorboard import TensorBoardLogs, _hparams
from tests.results.starts import search_start
from tests.watch.example_run import COMPLETED, ENDED, STOPPED, follow_trial, record, start, update


def events(folder: Path) -> list[Any]:
    """Return the events of a trial: each is its length, a checksum, the bytes, a checksum."""
    data, found = b"".join(path.read_bytes() for path in sorted(folder.iterdir())), []
    while data:
        length = int.from_bytes(data[:8], "little")
        assert checksum(data[:8]) == data[8:12]
        assert checksum(data[12 : 12 + length]) == data[12 + length : 16 + length]
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found[value.tag].append((event.step, value.simple_value))
    return found


def hyperparameters(folder: Path) -> dict[str, Any]:
    for event in events(folder):
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                found = content.session_start_info.hparams
                return {key: getattr(v, v.WhichOneof("kind")) for key, v in found.items()}
    raise AssertionError(f"{folder} has no hyperparameters")


def check_curves(logs: Path, record: TrialRecord) -> None:
    found = curves(logs / record.trial_id)
    for metric in record.metrics:
        assert [step for step, _ in found[metric]] == [r.samples_seen for r in record.reports]
        reported = [r.metrics[metric] for r in record.reports]
        assert [value for _, value in found[metric]] == pytest.approx(reported)
    assert found["speed/data_wait_fraction"] == [(r.samples_seen, 0.25) for r in record.reports]
    assert "speed/model_flops_utilization" not in found


def test_each_trial_has_its_curves_and_hyperparameters(tmp_path: Path) -> None:
    observer = TensorBoardLogs()
    observer.begin(start(tmp_path / "demo"))
    for ended in ENDED:
        follow_trial(observer, ended)
    observer.end({})
    assert observer.problem is None
    logs = tmp_path / "demo" / "tensorboard"
    assert {path.name for path in logs.iterdir()} == {r.trial_id for r in ENDED}
    for ended in ENDED:
        check_curves(logs, ended)
    assert curves(logs / "trial-0000")["live/train_loss"] == [
        (samples, 1.5) for samples in (50, 150, 250, 350)
    ]
    found = hyperparameters(logs / "trial-0001")
    assert found["lr_mp"] == 0.002
    assert found["vlm.lm_hidden_dim"] == 576
    assert (found["freeze"], found["compile"], found["data_cutoff_idx"]) == ("none", True, "None")
    last = events(logs / "trial-0001")[-2].summary.value[0]
    assert last.tensor.string_val[0].decode() == f"stopped: {STOPPED.reason}"


def test_hyperparameters_are_written_as_tensorboardx_writes_them() -> None:
    for number in range(2):  # the second finds what is the same for all trials
        config: dict[str, bool | float | str] = {
            "lr": 0.5 + number,
            "batch": 2,
            "name": f"a{number}",
            "on": True,
            "off": False,
        }
        assert _hparams(config, "accuracy") == hparams(config, {"accuracy": 0.0})
    assert _hparams({"lr": 1}, "loss") == hparams({"lr": 1}, {"loss": 0.0})


def test_a_running_trial_can_be_looked_at(tmp_path: Path) -> None:
    observer = TensorBoardLogs()
    observer.begin(start(tmp_path / "demo"))
    observer.trial_changed(record(1, 2, "running"))
    observer._background.close(10)
    check_curves(tmp_path / "demo" / "tensorboard", record(1, 2, "running"))
    observer._close()


def test_a_search_that_goes_on_has_no_point_twice(tmp_path: Path) -> None:
    logs = tmp_path / "demo" / "tensorboard"
    first = TensorBoardLogs()
    first.begin(start(tmp_path / "demo"))
    follow_trial(first, COMPLETED)
    first.trial_changed(record(1, 1, "running"))
    first.progress(update(1, 150))
    first.end({})
    (finished,) = (logs / "trial-0000").iterdir()
    before = finished.read_bytes()

    second = TensorBoardLogs()
    second.begin(start(tmp_path / "demo", records=(COMPLETED,)))
    follow_trial(second, STOPPED)
    second.end({})
    assert finished.read_bytes() == before
    check_curves(logs, STOPPED)

    shutil.rmtree(logs / "trial-0000")
    third = TensorBoardLogs()
    third.begin(start(tmp_path / "demo", records=(COMPLETED, STOPPED)))
    third.end({})
    check_curves(logs, COMPLETED)


def test_reports_that_are_made_again_are_not_written_again(tmp_path: Path) -> None:
    observer = TensorBoardLogs()
    observer.begin(start(tmp_path / "demo"))
    for count in (1, 2, 1, 2):  # its workers died
        observer.trial_changed(record(1, count, "running"))
    observer.trial_changed(STOPPED)
    observer.end({})
    check_curves(tmp_path / "demo" / "tensorboard", STOPPED)


def test_the_curves_of_a_trial_that_pauses_go_on_in_another_file(tmp_path: Path) -> None:
    observer = TensorBoardLogs()
    observer.begin(start(tmp_path / "demo"))
    for count in (1, 2):
        for state in ("running", "paused", "running"):
            observer.trial_changed(record(1, count, state))
        observer.trial_changed(record(2, 1, "paused"))
    observer.trial_changed(COMPLETED_LATER)
    observer.end({})
    logs = tmp_path / "demo" / "tensorboard"
    check_curves(logs, COMPLETED_LATER)
    check_curves(logs, record(2, 1, "paused"))
    assert [len([*(logs / f"trial-000{number}").iterdir()]) for number in (1, 2)] == [3, 1]


COMPLETED_LATER = record(1, 3, "completed")


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    started = start(tmp_path / "demo")
    (tmp_path / "demo" / "tensorboard").write_text("a file is in the way")
    observer = TensorBoardLogs()
    observer.begin(started)
    follow_trial(observer, COMPLETED)
    observer.end({})
    assert observer.problem is not None
    assert observer.problem.startswith("TensorBoard has failed, and recorded nothing after: ")


def test_only_curves_of_runs_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "tensorboard"
    for name in ("mine", "trial-0009"):  # the second was under way when the program was killed
        (root / name).mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    logs = TensorBoardLogs()
    logs.begin(search_start(tmp_path))
    logs.end({})
    assert logs.problem is None
    assert sorted(path.name for path in root.iterdir()) == ["mine", "notes.txt"]
