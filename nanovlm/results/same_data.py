"""Whether a run goes on with the data that it has begun with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.errors import UserError
from nanovlm.results.read import DATA_FILE, FolderReader


def check_same_data(folder: Path, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what could not be checked of the data with which the run in `folder` has begun.

    Raises UserError if it would go on with other data, or `data.json` is damaged.
    """
    reader, path = FolderReader(folder), folder / DATA_FILE
    before = reader.data()
    if reader.problems:
        remedy = "or remove it to go on unchecked"
        raise UserError(*(f"--resume: {problem}, {remedy}" for problem in reader.problems))
    if before is None:
        return (f"{path} was gone: whether the data is the same could not be checked",)
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    keys = {part: (before[part].get("folder", ""), data[part]["folder"]) for part in data}
    differing = [part for part, (old, new) in keys.items() if Path(old).name != Path(new).name]
    if differing:
        raise UserError(
            f"--resume: the data for {' and '.join(differing)} is not that of {path}: what was "
            "learnt from both could not be compared. Of a data set on the hub ID@COMMIT names a "
            "version; the files of a folder must be as they were, in content and time"
        )
    return ()
