"""The URL of a database: its password comes from the environment and is never shown.

    postgresql+psycopg://me:${NANOVLM_DB_PASSWORD}@host/nanovlm

`${NAME}` stands for an environment variable anywhere in the URL. Files, messages and commands hold
the name; the value is filled in only where the database is opened.
"""

import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote_plus

from nanovlm.errors import UserError

PLACEHOLDER = "${NANOVLM_DB_PASSWORD}"
"""Replaces a password in what is written to files, such as the command that resumes a search."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_USERINFO = re.compile(r"(?<=://)([^:/@\s]*):(.*)@")
"""User and password, up to the last `@`: a password with an `@` is a mistake, but still secret."""
_USERINFO_IN_TEXT = re.compile(r"(?<=://)([^:/@\s]*):(\S*)@")
_QUERY = re.compile(r"(?<=[?&])(\w*(?:pass|pwd|secret|token)\w*)=([^&\s'\"]*)", re.IGNORECASE)
"""Such as `?user=me&password=...`, which drivers take too."""


def hide_password(url: str, instead: str = "***") -> str:
    """Return the URL, or a word that has one in it, as it may be shown and written down."""
    return _hide(url, _USERINFO, instead)


def hide_passwords(text: str) -> str:
    """Return a text without the passwords of the URLs in it."""
    return _hide(text, _USERINFO_IN_TEXT, "***")


def hide_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with `PLACEHOLDER` for each password."""
    return [hide_password(word, PLACEHOLDER) for word in words]


def without_password_of(url: str, text: str) -> str:
    """Return what a driver said of this URL, in which it may have quoted the password."""
    found = [*_USERINFO.findall(url), *_QUERY.findall(url)]
    for secret in {form for _, value in found for form in (value, unquote_plus(value)) if form}:
        text = text.replace(secret, "***")
    return text


def fill_in(url: str) -> str:
    """Return the URL with the values of its variables.

    A value is taken as it is, also with characters that have a meaning in URLs; one that is all of
    the URL is an URL itself.

    Raises:
        UserError: a variable is not set.
    """
    names = _VARIABLE.findall(url)
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f"study.storage: {hide_password(url)} needs the environment variable "
            f"{' and '.join(dict.fromkeys(missing))}, which is not set"
        )
    if _VARIABLE.fullmatch(url):
        return os.environ[names[0]]
    return _VARIABLE.sub(lambda found: quote(os.environ[found[1]], safe=""), url)


def _hide(text: str, userinfo: re.Pattern[str], instead: str) -> str:
    def hidden(secret: str) -> str:
        return secret if not secret or _VARIABLE.fullmatch(secret) else instead

    text = userinfo.sub(lambda found: f"{found[1]}:{hidden(found[2])}@", text)
    return _QUERY.sub(lambda found: f"{found[1]}={hidden(found[2])}", text)
