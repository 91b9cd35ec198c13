"""Whether a search can go on in a results folder: only the same space can."""

from pathlib import Path

from nanovlm.errors import UserError
from nanovlm.results.read import SPACE_FILE, FolderReader
from nanovlm.results.store import choose_folder, is_there
from nanovlm.search.space import SearchSpace


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
    is_there(folder)
    check_same_space(folder, space)
    return folder


def check_same_space(folder: Path, space: SearchSpace) -> None:
    """Raise UserError if the folder holds no search of this space."""
    reader = FolderReader(folder)
    if not reader.has(SPACE_FILE):
        raise UserError(f"--resume: {folder} holds no search to go on with (no {SPACE_FILE})")
    theirs = reader.space(())
    reader.raise_if_damaged()
    assert theirs is not None, "it is there and not damaged"
    differing = space.differences(theirs)
    if differing:
        raise UserError(
            f"--resume: the search in {folder} is of another space; it differs in "
            f"{', '.join(differing)}; only the budget and bounds of objectives may change"
        )
