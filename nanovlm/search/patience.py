"""How a search waits for a storage that is away for a while: a database, or a full disk."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from nanovlm.distributed.session import StopSwitch
from nanovlm.search.study import STORAGE_ERRORS, StudyPlace

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""So long the storage may be away before the search ends."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def patiently(
    do: Callable[[], T], place: StudyPlace, switch: StopSwitch, tell: Callable[[str], None]
) -> T | None:
    """Return what `do` returns; try again while the storage is away, None if the search ends.

    Args:
        switch: ends the waiting; it is thrown when the patience is over.
        tell: told in a sentence that the storage fails.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = _FIRST_PAUSE
    while True:
        try:
            return do()
        except STORAGE_ERRORS as error:
            reason = place.without_password(str(error))
        text = f"the study's storage fails, trying again: {reason}"
        logger.warning("%s", text)
        if pause == _FIRST_PAUSE:
            tell(text)
        if time.monotonic() > deadline:
            switch.stop(f"study.storage: cannot be written: {reason}")
        switch.pause(pause)
        if switch.is_thrown():
            return None
        pause = min(_LONGEST_PAUSE, 2 * pause)
