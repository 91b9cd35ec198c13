"""The disk has filled up: whatever could not be written, a person is told once, and what to do."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nanovlm.errors import RunFailed
from nanovlm.files import find_full_disk, free_bytes, gib

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def told_of_full_disk(folder: Path, most_bytes: int | None = None) -> Iterator[None]:
    """Raise RunFailed in place of an error of a full disk that ends the context.

    Args:
        folder: the results folder.
        most_bytes: that the run may take there at a time; None if that is not known.
    """
    try:
        yield
    except Exception as error:
        cause = find_full_disk(error)
        if cause is None:
            raise
        logger.exception("the disk is full")
        raise RunFailed(_describe(folder, cause, most_bytes)) from error


def _describe(folder: Path, cause: str, most_bytes: int | None) -> str:
    free = free_bytes(folder)
    needed = ""
    if most_bytes is not None:
        held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        needed = f", and it may need {gib(max(0, most_bytes - held))} more"
    return (
        f"the disk is full: {cause}. The run is in {folder}, where {gib(free)} are free{needed}; "
        "what it has recorded is whole. Make room and go on with --resume"
    )
