"""Whether a run goes on with the data that it has begun with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.errors import UserError
from nanovlm.results.store import DATA_FILE


def check_same_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError if the run in `folder` would go on with other data than it has begun with."""
    path = folder / DATA_FILE
    if not path.exists():
        return
    before = json.loads(path.read_text())
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    keys = {part: (before[part]["folder"], data[part]["folder"]) for part in data}
    differing = [part for part, (old, new) in keys.items() if Path(old).name != Path(new).name]
    if differing:
        raise UserError(
            f"--resume: the data for {' and '.join(differing)} is not that of {path}: what was "
            "learnt from both could not be compared. Of a data set on the hub ID@COMMIT names a "
            "version; the files of a folder must be as they were, in content and time"
        )
