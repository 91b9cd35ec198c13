"""Names that people choose, as identifiers for systems that do not take every text.

A results folder may be called what the file system takes. Its name is shown as it is; actors and
gauges of Ray, which are ASCII, and runs and studies elsewhere, which have a longest name, are
called by what this module makes of it.
"""

import hashlib
import os
import re
from pathlib import Path

from nanovlm.errors import UserError

_LONGEST = 64
_PLAIN = re.compile(rf"[A-Za-z0-9._][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")
_HASH_DIGITS = 8


def identifier(name: str) -> str:
    """Return `name` if it has up to 64 ASCII letters, digits, `.`, `_` and `-`, the first no `-`;
    else the like of it with a hash, so that no two names give one identifier."""
    if _PLAIN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:_HASH_DIGITS]
    return f"{plain[: _LONGEST - _HASH_DIGITS - 1].strip('-')}-{digest}".lstrip("-")


def check_text(place: str, path: Path) -> None:
    """Raise UserError if a path is no text: files and messages that name it are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: must be UTF-8, got {os.fsencode(path)!r}") from None
