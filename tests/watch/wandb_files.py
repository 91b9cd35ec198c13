"""Reads what W&B has recorded offline: protocol buffers in the log format of LevelDB."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEAD = 7
"""Bytes before the first block, and of the head of each piece of a record."""
_BLOCK = 32768


@dataclass
class OfflineRun:
    """What one run of W&B consists of, as `wandb sync` would send it."""

    run: Any
    history: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}

    def curve(self, metric: str, against: str = "samples_seen") -> list[tuple[float, float]]:
        return [(row[against], row[metric]) for row in self.history if metric in row]


def offline_runs(folder: Path) -> dict[str, OfflineRun]:
    """Return the runs recorded in a results folder, by name."""
    runs = [read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    assert len({run.run.display_name for run in runs}) == len(runs)
    return {run.run.display_name: run for run in runs}


def read_run(path: Path) -> OfflineRun:
    found: OfflineRun | None = None
    for content in _records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found = found or OfflineRun(record.run)
            found.tags = list(record.run.tags)
        elif found is not None and kind == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            found.history.append(row)
        elif found is not None and kind == "summary":
            for item in record.summary.update:
                name = item.key or "/".join(item.nested_key)
                found.summary[name] = json.loads(item.value_json)
        elif found is not None and kind == "exit":
            found.exit_code = record.exit.exit_code
    assert found is not None, f"{path} has no run"
    return found


def _records(data: bytes) -> Iterator[bytes]:
    position, whole = _HEAD, b""
    while position + _HEAD <= len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _HEAD:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + _HEAD : position + _HEAD + length]
        position += _HEAD + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""
