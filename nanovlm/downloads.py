"""A folder that a setting names: one on this disk, or the files of a repository on the hub.

The hub is asked once in a process for the same files, so later trials of a worker start from the
same bytes, and at once.
"""

import re
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from nanovlm.errors import WITHOUT_HUB, UserError
from nanovlm.files import find_local_folder, user_path

HUB_ERRORS = (OSError, HTTPError, ValueError)
"""What the hub's client raises: no such repository or file, not reachable, not an id."""


def find_folder(
    setting: str, name: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """Return the folder `name`, or the one where the hub's repository `name` lies after download.

    Args:
        setting: that holds `name`, for the message.
        patterns: the files to download; nothing else is.
        revision: a branch, tag or commit of the repository; None means its main branch.

    Raises:
        UserError: there is no such folder, and the hub does not give it.
    """
    named = f"{setting}={name!r}"
    return find_local_folder(named, name) or download(named, name, patterns, revision)


def download(
    setting: str,
    name: str,
    patterns: tuple[str, ...],
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
) -> Path:
    """Return the folder of the hub's cache that holds these files of a repository.

    Args:
        setting: that names the repository, with its value, for the message.

    Raises:
        UserError: neither the hub nor its cache has the repository, or a model's files.
    """
    try:
        return _downloaded(name, patterns, revision, kind)
    except HUB_ERRORS as error:
        repository = name if revision is None else f"{name} at revision {revision}"
        raise UserError(
            f"{setting}: there is no folder {name}, and {', '.join(patterns)} of the {kind} "
            f"{repository} came neither from the hub nor from its cache: {first_reason(error)}. "
            f"{WITHOUT_HUB}"
        ) from error


@cache
def _downloaded(name: str, patterns: tuple[str, ...], revision: str | None, kind: str) -> Path:
    # Not file by file: hf_hub_download repeats its requests for 23 s where there is no network.
    folder = Path(
        snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
    )
    # Without network a part of the repository in the cache counts as the repository. A data set
    # may have no card.
    if kind == "model" and not any(path for p in patterns for path in folder.glob(p)):
        raise FileNotFoundError(f"{folder} holds none of these files")
    return folder


def hub_files(setting: str, repository: str, revision: str) -> list[str]:
    """Return the paths of all files of a data set on the hub.

    Raises:
        UserError: the hub cannot be reached.
    """
    try:
        return HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
    except HUB_ERRORS as error:
        raise UserError(
            f"{setting}: the hub does not list the files of {repository}: {first_reason(error)}; "
            "with stream_dataset=false the hub's cache serves without network"
        ) from error


def forget_downloads() -> None:
    """Ask the hub again from now on: a repository has changed."""
    _downloaded.cache_clear()


def split_revision(path: str) -> tuple[str, str | None]:
    """Return the id and the revision of `id@revision`; None stands for the newest."""
    repository, _, revision = path.partition("@")
    return repository, revision or None


def is_hub_id(name: str) -> bool:
    """Return whether `find_folder` would ask the hub for `name`, which is of its form."""
    return not user_path(name).is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def first_reason(error: BaseException) -> str:
    """Return in one line the reason of an error of the hub's client."""
    # The error itself holds the hub's answer; its cause holds what the network did.
    source = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    lines = (line.strip() for line in str(source).splitlines())
    line = next((x for x in lines if x and "Client Error." not in x), type(source).__name__)
    return line.rstrip(".")
