"""The exceptions that are shown to users: errors in the input, and runs that had to end."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

WITHOUT_HUB = (
    "What was downloaded elsewhere is found in the folder HF_HOME, with HF_HUB_OFFLINE=1 without "
    "asking the hub, and a folder can stand in place of the id; search_spaces/digits.yaml runs "
    "now, without hub and download"
)
"""The end of messages about files that the hub does not provide."""


class UserError(Exception):
    """Input that cannot be used. The programs print it without a traceback and exit with code 2.

    Each message gives the location, the rule, the value and, where there are some, the choices.
    All errors of an input are collected and raised together.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, ...]]:
        return type(self), self.messages  # survives the way between processes


class RunFailed(Exception):
    """A run that had to end although the input was right: the disk is full, or a part of the
    cluster is lost. Its records stay, and it can be resumed.

    The programs print it without a traceback and exit with code 1.
    """

    folder: Path | None = None
    """The results folder to resume."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest choice, or all choices when none is near."""
    known: Sequence[str] = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Choices: {', '.join(known)}."


def plain_rule(message: str) -> str:
    """Return the rule of a message of pydantic in the style of this program."""
    rule = message.removeprefix("Value error, ")
    rule = re.sub(r"^(Input|Dictionary|Tuple) should", "must", rule)
    rule = re.sub(r" after validation, not \d+$", "", rule)
    return rule[:1].lower() + rule[1:]


class ErrorCollector:
    """Collects the UserErrors of several independent checks, to raise them as one.

    with problems:
        check_this()
    with problems:
        check_that()
    problems.raise_if_any()
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if isinstance(error, UserError):
            self.messages += error.messages
            return True
        return False

    def raise_if_any(self) -> None:
        if self.messages:
            raise UserError(*self.messages)
