"""Whether W&B can be reached, asked once and for two seconds at most, and never with a prompt."""

import http.client
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal

from nanovlm.config import TrainConfig
from nanovlm.errors import UserError

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
    # Reports of failures to W&B's makers would be tried without network too, and told on stderr.
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
