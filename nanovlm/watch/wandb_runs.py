"""Weights & Biases follows a run whose configuration says `log_wandb: true`.

Each trial is a run of W&B, grouped by the search, with its metrics against `samples_seen`; the
search itself is one more. All of it happens in a thread of its own in the program that runs the
search; workers know nothing of W&B.
"""

import hashlib
import http.client
import logging
import os
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanovlm.config.schema import TrainConfig
from nanovlm.config.yaml_text import parse_yaml
from nanovlm.errors import UserError
from nanovlm.files import remove_folder, replace_text
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.watch.curves import Background, report_values, update_values
from nanovlm.watch.observer import Observer, RunStart

logger = logging.getLogger(__name__)

PROJECT = "nanovlm"
SAMPLES_SEEN = "samples_seen"
LIVE_SAMPLES_SEEN = "live/samples_seen"
SEARCH = "search"
MAX_TAG = 64
"""Characters that W&B allows in a tag."""
_SEARCH_ID = re.compile(rb"[0-9a-f]{8}")
MAX_NAME = 128
"""In the name of a run or of a group."""

END_SECONDS = 30.0
"""How long the end of a run may wait for what is not recorded yet."""
LOST_SECONDS = 1.0
"""How long it waits if W&B's server does not answer any more; the data is on disk."""


@dataclass
class _Trial:
    """A trial whose run of W&B is open; it stays so while the trial is paused."""

    run: Any
    sent: float
    """Samples seen at the last report that was sent."""
    is_paused: bool = False


class WandbRuns(Observer):
    """Sends everything to W&B, or records it for `wandb sync`."""

    def __init__(
        self, tell: Callable[[str], None] = logger.info, end_seconds: float = END_SECONDS
    ) -> None:
        """
        Args:
            tell: takes a line on where the runs go, in the thread that found it out.
            end_seconds: how long `end` may take.
        """
        self._tell = tell
        self._end_seconds = end_seconds
        self._background = Background("W&B")
        self._is_wanted = False
        self._mode: WandbMode | None = None
        self._failed_online: str | None = None
        self._trials: dict[str, _Trial] = {}
        self._ended: dict[str, TrialRecord] = {}

    @property
    def problem(self) -> str | None:
        return self._background.problem or self._failed_online

    @property
    def notes(self) -> Sequence[str]:
        """The problem, or where the runs are if W&B could not be reached."""
        if self.problem is not None:
            return (self.problem,)
        is_offline = self._mode is not None and self._mode.mode == "offline"
        return (self._where(),) if is_offline else ()

    def begin(self, start: RunStart) -> None:
        self._is_wanted = start.config.log_wandb
        if not self._is_wanted:
            return
        self._start = start
        self._folder = start.folder / "wandb"
        self._background.do(self._connect)
        self._ended = {r.trial_id: r for r in (*start.records, *start.confirmed)}
        self._background.do(self._catch_up)

    def progress(self, update: ProgressUpdate) -> None:
        if self._is_wanted and update.stage == "training" and not self._background.is_behind():
            self._background.do(lambda: self._send_update(update))

    def trial_changed(self, record: TrialRecord) -> None:
        if self._is_wanted:
            self._background.do(lambda: self._send(record))

    def end(self, summary: Mapping[str, Any]) -> None:
        if not self._is_wanted:
            return
        self._background.do(lambda: self._finish(summary))
        self._background.close(self._seconds_to_wait())

    # ------------------------------------------------------------------ in the thread

    def _connect(self) -> None:
        self._folder.mkdir(exist_ok=True)  # W&B takes a folder of the system if it is not there
        self._ids = self._folder / "search-id"
        # Of an empty one the ids of the runs would be those of other searches.
        if not self._ids.exists() or not _SEARCH_ID.fullmatch(self._ids.read_bytes()):
            replace_text(self._ids, secrets.token_hex(4))
        self._done = self._folder / "finished-trials"
        self._mode = find_mode()
        self._tell(self._where())

    def _where(self) -> str:
        assert self._mode is not None
        line = f"W&B: {self._mode.mode}, {self._mode.reason}"
        if self._mode.mode == "offline":
            line += f". To send the runs later: wandb sync {self._folder}/offline-run-*"
        return line

    def _catch_up(self) -> None:
        """Send trials that had ended when the program was killed, but were not all sent."""
        done = self._done.read_text(errors="replace").split() if self._done.exists() else []
        for record in list(self._ended.values()):
            if record.trial_id not in done:
                self._send(record)

    def _send(self, record: TrialRecord) -> None:
        trial = self._trials.get(record.trial_id)
        if trial is None:
            trial = self._trials[record.trial_id] = self._open_trial(record)
        for report in record.reports:
            if report.samples_seen > trial.sent:  # else a trial whose workers died makes it again
                trial.sent = report.samples_seen
                trial.run.log({SAMPLES_SEEN: trial.sent, **report_values(report)})
        if record.is_paused != trial.is_paused:
            trial.is_paused = record.is_paused
            trial.run.summary.update({"state": record.state})
        if record.end is not None:
            self._end_trial(record, self._trials.pop(record.trial_id).run)

    def _open_trial(self, record: TrialRecord) -> _Trial:
        kind = "confirm" if record.confirms else "trial"
        run = self._open(record.trial_id, record.trial_id, kind, dict(record.config))
        run.define_metric(SAMPLES_SEEN)
        run.define_metric("*", step_metric=SAMPLES_SEEN)
        run.define_metric(LIVE_SAMPLES_SEEN)
        run.define_metric("live/*", step_metric=LIVE_SAMPLES_SEEN)
        # Of a run that goes on W&B knows what it was sent.
        return _Trial(run, run.summary.get(SAMPLES_SEEN) or 0.0)

    def _end_trial(self, record: TrialRecord, run: Any) -> None:
        self._ended[record.trial_id] = record
        run.summary.update({"state": record.state, "reason": record.reason})
        run.tags = _tags(record.state, record.reason)
        run.finish(exit_code=int(record.state == "failed"))
        with self._done.open("a") as file:
            file.write(f"{record.trial_id}\n")

    def _send_update(self, update: ProgressUpdate) -> None:
        trial = self._trials.get(update.trial_id)
        if trial is not None:
            trial.run.log({LIVE_SAMPLES_SEEN: update.samples_seen, **update_values(update)})

    def _finish(self, summary: Mapping[str, Any]) -> None:
        for trial in self._trials.values():  # they may go on another day
            trial.run.tags = ("paused" if trial.is_paused else "interrupted",)
            trial.run.finish(exit_code=0 if trial.is_paused else 1)
        self._trials.clear()
        if self._start.space is not None:
            self._send_summary(summary, parse_yaml(self._start.space.to_yaml(), "space"))

    def _send_summary(self, summary: Mapping[str, Any], space: Mapping[str, Any]) -> None:
        import wandb

        run = self._open(SEARCH, self._start.folder.name, SEARCH, space)
        run.summary.update(dict(summary))
        metric = self._start.objective.metric
        records = sorted(self._ended.values(), key=lambda r: (r.confirms, r.number))
        keys = sorted({key for record in records for key in record.parameters})
        rows = [
            [r.trial_id, r.state, r.reason, r.samples_seen, r.metrics.get(metric)]
            + [None if (v := r.parameters.get(key)) is None else str(v) for key in keys]
            for r in records
        ]
        columns = ["trial_id", "state", "reason", SAMPLES_SEEN, metric, *keys]
        run.log({"trials_table": wandb.Table([*columns], rows)})
        run.tags = _tags(summary.get("ended_by"))
        run.finish()

    # ------------------------------------------------------------------ runs of W&B

    def _open(self, what: str, name: str, kind: str, config: Mapping[str, Any]) -> Any:
        """Open a run; from the first one that the server refuses, all are recorded offline."""
        import wandb

        assert self._mode is not None
        if self._mode.mode != "online":
            run = self._init(self._run_id(what), name, kind, config, mode=self._mode.mode)
            self._remove_earlier(run)
            return run
        try:
            return self._init(self._run_id(what), name, kind, config, resume="allow")
        except wandb.Error as error:
            logger.exception("W&B refuses a run")
            self._mode = WandbMode("offline", f"since the server refuses runs: {error}")
            self._failed_online = self._where()
            self._tell(self._failed_online)
            replace_text(self._ids, secrets.token_hex(4))  # wandb holds on to the id it failed with
            return self._open(what, name, kind, config)

    def _init(
        self, run_id: str, name: str, kind: str, config: Mapping[str, Any], **options: Any
    ) -> Any:
        import wandb

        return wandb.init(
            project=PROJECT,
            entity=self._start.config.wandb_entity,
            dir=str(self._start.folder),
            id=run_id,
            name=name[:MAX_NAME],
            group=self._start.folder.name[:MAX_NAME],
            job_type=kind,
            config=dict(config),
            reinit="create_new",
            settings=_quiet_settings(),
            **options,
        )

    def _run_id(self, what: str) -> str:
        """Return an id that is the same when the search goes on, and no other search has."""
        text = f"{self._ids.read_text()} {what}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _remove_earlier(self, run: Any) -> None:
        """Remove what an interrupted program has recorded of the run; this one has it all again."""
        for folder in self._folder.glob(f"offline-run-*-{run.id}*"):
            if folder != Path(run.dir).parent:
                remove_folder(folder)

    def _seconds_to_wait(self) -> float:
        is_online = self._mode is not None and self._mode.mode == "online"
        if is_online and not answers(_settings().base_url, LOST_SECONDS):
            return min(self._end_seconds, LOST_SECONDS)
        return self._end_seconds


def _tags(*texts: str | None) -> tuple[str, ...]:
    return tuple(text[:MAX_TAG] for text in texts if text)


def _quiet_settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_stats=True,  # of this machine, the same for each of the trials on it
        x_save_requirements=False,
        init_timeout=15,
        finish_timeout=10,
    )


CHECK_SECONDS = 2.0
"""How long W&B's server may take to answer."""

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
"""What wandb takes for WANDB_MODE."""

_ENTITY = re.compile(r"[\w.-]+", re.ASCII)
_LOGIN = "`wandb login` or WANDB_API_KEY gives one"


@dataclass(frozen=True)
class WandbMode:
    """How runs are recorded, and why."""

    mode: Literal["online", "offline", "disabled"]
    reason: str


def check_wandb(config: TrainConfig) -> None:
    """Raise UserError if the settings for W&B cannot be used. Asks nothing of the network."""
    if not config.log_wandb:
        return
    if config.wandb_entity is not None and not _ENTITY.fullmatch(config.wandb_entity):
        raise UserError(
            "wandb_entity: must be the name of a user or team of W&B (letters, digits, '-', '_' "
            f"and '.'), or null for the default one, got {config.wandb_entity!r}"
        )
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise UserError(f"WANDB_MODE: must be one of {', '.join(MODES)}, got {mode!r}")
    has_key = set_up_quietly()
    if mode in ("online", "run", "shared") and not has_key:
        raise UserError(f"WANDB_MODE={mode}: there is no API key for W&B; {_LOGIN}")


def set_up_quietly() -> bool:
    """Let wandb read its settings, and print nothing from now on; return whether it has a key.

    Raises:
        UserError: if wandb cannot use the settings.
    """
    # Reports of failures to W&B's makers would be tried without network too, and show on stderr.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # takes seconds, which only those wait who want it

    try:
        wandb.setup(wandb.Settings(silent=True, console="off"))
        if _settings().mode in ("offline", "dryrun", "disabled"):
            return False
        return wandb.login(prompt=False, verify=False)
    except (ValueError, wandb.Error) as error:
        raise UserError(f"log_wandb: W&B cannot use its settings: {error}") from None


def find_mode() -> WandbMode:
    """Return how runs are recorded: as the user says, else online if there is a key and a server.

    Raises:
        UserError: if wandb cannot use its settings.
    """
    has_key = set_up_quietly()
    settings = _settings()
    if settings.mode in ("offline", "dryrun"):
        return WandbMode("offline", "as WANDB_MODE or the settings of W&B say")
    if settings.mode == "disabled":
        return WandbMode("disabled", "as WANDB_MODE says")
    if os.environ.get("WANDB_MODE"):
        return WandbMode("online", "as WANDB_MODE says")
    if not has_key:
        return WandbMode("offline", f"since there is no API key ({_LOGIN})")
    if not answers(settings.base_url):
        return WandbMode("offline", f"since {settings.base_url} does not answer")
    return WandbMode("online", f"to {settings.base_url}")


def answers(url: str, seconds: float = CHECK_SECONDS) -> bool:
    """Return whether an HTTP server, or the proxy before it, answers within so many seconds."""
    found = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError, http.client.HTTPException):
            return
        found.set()

    # In a thread, since looking up the name of a host has no time limit of its own.
    threading.Thread(target=ask, name="wandb-check", daemon=True).start()
    return found.wait(seconds)


def _settings() -> "wandb.Settings":  # type: ignore[name-defined]  # noqa: F821
    import wandb

    return wandb.setup().settings
