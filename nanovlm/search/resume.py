"""Whether a search can go on in a results folder: the same space, the same data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.errors import UserError
from nanovlm.results.store import DATA_FILE, SPACE_FILE, choose_folder
from nanovlm.search.space import SearchSpace, load_space


def search_folder(results: Path, name: str | None, space: SearchSpace, resume: bool) -> Path:
    """Return the results folder to make, or with `resume` the one to go on with.

    Args:
        results: where results folders are made.
        name: of the folder; None takes the space's name.

    Raises:
        UserError: the name is taken, or there is no such search to go on with.
    """
    if not resume:
        return choose_folder(results, name, space.name)
    folder = results / (name or space.name)
    check_same_space(folder, space)
    return folder


def check_same_space(folder: Path, space: SearchSpace) -> None:
    """Raise UserError if the folder holds no search of this space."""
    if not (folder / SPACE_FILE).exists():
        raise UserError(f"--resume: {folder} holds no search to go on with (no {SPACE_FILE})")
    differing = space.differences(load_space(folder / SPACE_FILE))
    if differing:
        raise UserError(
            f"--resume: the search in {folder} is of another space; it differs in "
            f"{', '.join(differing)}; only the budget may change"
        )


def check_same_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError if a search would go on with other data than it has begun with."""
    path = folder / DATA_FILE
    if not path.exists():
        return
    before = json.loads(path.read_text())
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    keys = {part: (before[part]["folder"], data[part]["folder"]) for part in data}
    differing = [part for part, (old, new) in keys.items() if Path(old).name != Path(new).name]
    if differing:
        raise UserError(
            f"--resume: the data for {' and '.join(differing)} is not that of {path}: trials on "
            "both could not be compared. Of a data set on the hub ID@COMMIT names a version; the "
            "files of a folder must have the sizes and times that they had"
        )
