"""A disk without room, made by the system's limit to the size of a file."""

import contextlib
import resource
from collections.abc import Iterator


def limit_files(size: int | None) -> None:
    """Let no write of this process go beyond so many bytes of a file; None lifts the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Set the limit for as long as the context lasts."""
    limit_files(size)
    try:
        yield
    finally:
        limit_files(None)
