"""TensorBoard follows every run: `tensorboard/<trial_id>/` of the results folder.

    tensorboard --logdir results/NAME/tensorboard

Always there, since it costs next to nothing. The curves are against samples seen, and the HPARAMS
page compares the trials by their configurations.
"""

import functools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c

from nanovlm.config.sources import flat_values
from nanovlm.files import remove_folder
from nanovlm.messages import RUN_ID, ProgressUpdate, TrialRecord
from nanovlm.watch.curves import Background, report_values, update_values
from nanovlm.watch.observer import Observer, RunStart

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

FOLDER = "tensorboard"

END_SECONDS = 10.0
"""How long the end of a run may wait for what is not written yet."""


class TensorBoardLogs(Observer):
    """Writes event files, in a thread of its own."""

    def __init__(self) -> None:
        self._background = Background("TensorBoard")
        self._curves: dict[str, _Curves] = {}

    @property
    def problem(self) -> str | None:
        return self._background.problem

    def begin(self, start: RunStart) -> None:
        self._folder = start.folder / FOLDER
        self._metric = start.objective.metric
        ended = {record.trial_id: record for record in (*start.records, *start.confirmed)}
        self._background.do(lambda: self._catch_up(ended))

    def progress(self, update: ProgressUpdate) -> None:
        if update.stage == "training" and not self._background.is_behind():
            self._background.do(lambda: self._write_update(update))

    def trial_changed(self, record: TrialRecord) -> None:
        self._background.do(lambda: self._write(record))

    def end(self, summary: Mapping[str, Any]) -> None:
        self._background.do(self._close)
        self._background.close(END_SECONDS)

    # ------------------------------------------------------------------ in the thread

    def _catch_up(self, ended: Mapping[str, TrialRecord]) -> None:
        """Remove what there is of unfinished trials: all their reports come again."""
        found = {path.name for path in self._folder.glob("*")}
        for name in found - ended.keys():
            if RUN_ID.fullmatch(name):
                remove_folder(self._folder / name)
        for trial_id in ended.keys() - found:
            self._write(ended[trial_id])

    def _write(self, record: TrialRecord) -> None:
        curves = self._curves.get(record.trial_id)
        if curves is None:
            curves = _Curves(self._folder / record.trial_id, record, self._metric)
            self._curves[record.trial_id] = curves
        curves.add_reports(record)
        if record.end is not None:
            self._curves.pop(record.trial_id).end(record)
        elif record.is_paused:
            curves.close()

    def _write_update(self, update: ProgressUpdate) -> None:
        if curves := self._curves.get(update.trial_id):
            curves.add(update_values(update), update.samples_seen)

    def _close(self) -> None:
        for curves in self._curves.values():
            curves.close()
        self._curves.clear()


class _Curves:
    """The event files of one trial: a new one after each pause, in which none is held open.

    Not a `SummaryWriter`: it writes in a thread of its own, from which an error never comes back.
    Nor an `EventsWriter`: it syncs with each flush, for which other files would have to wait.
    """

    def __init__(self, folder: Path, record: TrialRecord, metric: str) -> None:
        """Write the configuration, for the HPARAMS page."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO | None = None
        self._num_files = 0
        self._sent = -1.0
        # TensorBoard takes no lists and no null.
        config = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat_values(record.config).items()
        }
        experiment, session, self._end = _hparams(config, metric)
        self._write(experiment, 0)
        self._write(session, 0).flush()

    def add_reports(self, record: TrialRecord) -> None:
        """Write the reports that are new: a trial whose workers died makes the same ones again."""
        for report in record.reports:
            if report.samples_seen > self._sent:
                self._sent = report.samples_seen
                self.add(report_values(report), report.samples_seen).flush()

    def add(self, values: Mapping[str, float], samples_seen: int) -> BinaryIO:
        """Write points of curves; they reach the file with the next report."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        return self._write(Summary(value=scalars), samples_seen)

    def end(self, record: TrialRecord) -> None:
        """Write how the trial ended, and close the file."""
        from tensorboardX.summary import text

        how = record.state if record.reason is None else f"{record.state}: {record.reason}"
        self._write(text("state", how), record.samples_seen)
        self._write(self._end, record.samples_seen)
        self.close()

    def close(self) -> None:
        """Close the file; what comes after goes into another one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, summary: "Summary", samples_seen: int) -> BinaryIO:
        from tensorboardX.proto.event_pb2 import Event

        if self._file is None:
            # Beside the time in whole seconds; TensorBoard reads the files in the order of names.
            suffix = f".{self._num_files}" if self._num_files else ""
            name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}{suffix}"
            self._file = (self._folder / name).open("wb")
            self._num_files += 1
            self._file.write(_framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
        event = Event(wall_time=time.time(), step=samples_seen, summary=summary)
        self._file.write(_framed(event))
        return self._file


def _hparams(
    config: Mapping[str, bool | float | str], metric: str
) -> "tuple[Summary, Summary, Summary]":
    """Return what `tensorboardX.summary.hparams` does, in a quarter of its time: the keys, the
    values, and that the trial has ended. The keys of all trials of a search are the same."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo
    from tensorboardX.proto.summary_pb2 import Summary

    experiment, session, end = _hparams_of_kinds(
        tuple((key, type(value)) for key, value in config.items()), metric
    )
    values = SessionStartInfo()
    for key, value in config.items():
        if isinstance(value, str):
            values.hparams[key].string_value = value
        elif isinstance(value, bool):
            values.hparams[key].bool_value = value
        else:
            values.hparams[key].number_value = value
    filled = Summary()
    filled.CopyFrom(session)
    data = filled.value[0].metadata.plugin_data
    data.content = HParamsPluginData(session_start_info=values).SerializeToString()
    return experiment, filled, end


@functools.lru_cache(maxsize=1)
def _hparams_of_kinds(
    kinds: tuple[tuple[str, type], ...], metric: str
) -> "tuple[Summary, Summary, Summary]":
    # Imported late: it wants torch, which a program has not loaded before its first run.
    from tensorboardX.summary import hparams

    found: tuple[Summary, Summary, Summary] = hparams(
        {key: kind() for key, kind in kinds}, {metric: 0.0}
    )
    return found


def _framed(event: "Event") -> bytes:
    """Return an event as a record of an event file: its length and its bytes, each with a masked
    checksum (TFRecord's format)."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _masked_checksum(length) + data + _masked_checksum(data)


def _masked_checksum(data: bytes) -> bytes:
    # tensorboardX computes it byte by byte, in Python: half of what a record costs.
    found = google_crc32c.value(data)
    return struct.pack("<I", ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF)
