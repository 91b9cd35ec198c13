"""The figures of a benchmark as a file, for those who come after and cannot read its text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovlm.files import replace_json


class Figures:
    """What a benchmark has measured so far; in a file, if one is wanted, that is written anew each
    time: a benchmark that is cut off leaves what it had."""

    def __init__(self, path: Path | None, **values: Any) -> None:
        self._path, self._all = path, values
        self._values = values

    def part(self, name: str) -> "Figures":
        """Return those that stand together under a name."""
        part = Figures(self._path)
        part._all, part._values = self._all, self._values.setdefault(name, {})
        return part

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._values.items()

    def add(self, **values: Any) -> None:
        """Write down more; None where the machine cannot tell."""
        self._values.update(values)
        if self._path is not None:
            replace_json(self._path, self._all)
