"""The run that `best.yaml` and `best/` of a results folder are of, by the records there."""

from pathlib import Path

from nanovlm.config_files import flat_values
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import confirmation_by_what_is_left
from nanovlm.results.read import ANSWERS_DIR, BEST_CONFIG_FILE, TRIALS_FILE, FolderReader, read_text
from nanovlm.results.summary import final_best


def best_of(reader: FolderReader) -> TrialRecord | None:
    """Return the best run by what can be read of the records; None if none ran its full budget."""
    records, confirmed = reader.ended()
    space = reader.space(records)
    objective = space.objective if space else reader.objective()
    confirmation, _ = confirmation_by_what_is_left(
        confirmed, records, objective, reader.folder / ANSWERS_DIR
    )
    return final_best(records, objective, confirmed, confirmation)


def check_best_config(path: Path) -> None:
    """Raise UserError if `path` is the `best.yaml` of a results folder and lacks keys: it is cut.

    Without this the defaults would stand in for what is lost.
    """
    reader = FolderReader(path.parent)
    if path.name != BEST_CONFIG_FILE or not path.exists() or not reader.has(TRIALS_FILE):
        return
    if not (read_text(path) or "").endswith("\n"):
        raise UserError(f"{path}: is cut in its last line; --resume of its search writes it anew")
    best = best_of(reader)
    if best is None:
        return
    lacks = [
        *(flat_values(best.config).keys() - flat_values(reader.config(path.name) or {}).keys())
    ]
    if lacks:
        raise UserError(
            f"{path}: is cut: it lacks {len(lacks)} keys of {best.trial_id}, such as "
            f"{min(lacks)}; --resume of its search writes it anew"
        )
