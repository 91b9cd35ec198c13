"""Files and folders: paths of the user, checks with reasons, files that are written as a whole.

`~` at the beginning of a path is the home folder wherever a path comes in: a shell expands it only
at the beginning of a word, and not in `key=~/data`, `--name=~/x` or a YAML file.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanovlm.errors import UserError

LFS_HEAD = b"version https://git-lfs"
"""The first bytes of a pointer of Git LFS."""
PART_SUFFIX = ".part"
"""Ending of a file that is being written."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota that is used up, a file of the largest size that is allowed."""
_FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), f"(os error {errno.EFBIG})")

_BLOCK_BYTES = 64 * 2**10
_NUM_BLOCKS = 16
_TAIL_BYTES = 2**20


def user_path(name: str | Path) -> Path:
    """Return the path that a person means by `name`."""
    return Path(os.path.expanduser(name))


_addresses: dict[Path, Callable[[str], str]] = {}


def name_as(folder: Path, address_of: Callable[[str], str]) -> None:
    """Let `shown` name what is in a folder in another way: it is a copy.

    Args:
        folder: without links in its path.
        address_of: returns how a person names a file in it, by its relative path.
    """
    _addresses[folder] = address_of


def shown(path: Path) -> str:
    """Return how a person gets to a file or folder: its path, or where it is kept for good."""
    for folder, address_of in _addresses.items():
        if path.is_relative_to(folder):
            return address_of(path.relative_to(folder).as_posix())
    return str(path)


def find_local_folder(setting: str, name: str) -> Path | None:
    """Return the folder `name`; None if there is nothing by that name, so it may be a hub id.

    Args:
        setting: the one that holds `name`, for the message.

    Raises:
        UserError: it is a file, or a link to what is not there.
    """
    path = user_path(name)
    if path.is_dir():
        return path
    problem = f"{path} is a file, where a folder is wanted" if path.exists() else _broken_link(path)
    if problem:
        raise UserError(f"{setting}: {problem}")
    return None


def check_whole(setting: str, *files: Path) -> None:
    """Raise UserError with all files that are links to nothing or pointers of Git LFS, or locked.

    Files that do not exist are not checked.
    """
    problems = [problem for file in files if (problem := _broken_link(file) or _not_the_file(file))]
    if problems:
        raise UserError(*(f"{setting}: {problem}" for problem in problems))


def _broken_link(path: Path) -> str | None:
    if not path.is_symlink() or path.exists():
        return None
    return f"{path} is a symbolic link to {os.readlink(path)}, and nothing is there"


def _not_the_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_HEAD)) == LFS_HEAD
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not is_pointer:
        return None
    return (
        f"{path} is a pointer of Git LFS and not the file itself; `git lfs pull` in its repository "
        "fetches that"
    )


class Version(NamedTuple):
    """What tells a file from the one that replaces it."""

    inode: int
    size: int
    """In bytes."""
    changed_at: int
    """In ns."""

    @classmethod
    def of(cls, file: Path | int) -> "Version":
        """Return the version of a file that is there, given its path or its descriptor.

        Raises:
            FileNotFoundError: it is not.
        """
        status = os.stat(file)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def fingerprint(path: Path) -> str:
    """Return a hash that tells a file from others of its size without reading all of it.

    Of a file up to 2 MiB all bytes count. Of a larger one: 16 blocks of 64 KiB at equal distances,
    and the last MiB, where a parquet file has the sizes, offsets, and least and greatest values of
    all its parts.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        body = size - _TAIL_BYTES
        if body > _NUM_BLOCKS * _BLOCK_BYTES:
            for number in range(_NUM_BLOCKS):
                file.seek(number * body // _NUM_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
            file.seek(body)
        digest.update(file.read())
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file, which replaces `path` once it is safe on the disk.

    A reader finds the old file or the new one, also after a power loss. Nothing changes if the
    context ends with an error. The folder must exist.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        yield part
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write the file as a whole, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def replace_json(path: Path, content: Any) -> None:
    """Write the file as a whole, as `replace_text` does."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def append(path: Path, text: str, is_synced: bool = True) -> None:
    """Add text to the end of a file, all of it or none: where the disk is full, nothing is cut.

    Args:
        is_synced: return when it is safe on the disk.

    Raises:
        OSError: it could not be written.
    """
    with path.open("ab", buffering=0) as file, or_cut_back(file, os.fstat(file.fileno()).st_size):
        rest = memoryview(text.encode("utf-8"))
        while rest:
            rest = rest[file.write(rest) :]  # a disk that is nearly full takes a part
        if is_synced:
            os.fsync(file.fileno())


@contextlib.contextmanager
def or_cut_back(file: IO[bytes], size: int) -> Iterator[None]:
    """Cut an open file back to `size` bytes if what is done meanwhile raises OSError."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def find_full_disk(error: BaseException) -> str | None:
    """Return the message of a full disk in an error or its causes; None if there is none.

    Errors of another process, or of a library in another language, are known by their text alone.
    """
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        is_full = isinstance(found, OSError) and found.errno in _FULL
        if is_full or any(text in str(found) for text in _FULL_TEXTS):
            return " ".join(str(found).strip().splitlines()[-1:])
        found = found.__cause__ or found.__context__
    return None


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk that `folder` lies on, or will lie on."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gib(num_bytes: int) -> str:
    """Return bytes as `1.2 GiB`, or MiB below one."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.3g} {name}"


def remove_parts(folder: Path) -> None:
    """Remove unfinished files of killed writers; nobody else may be writing in the folder."""
    for part in folder.glob(f".*.[0-9]*{PART_SUFFIX}"):
        if part.is_file():
            part.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that this program has made; anything else, and links, are left alone."""
    if path.is_dir() and not path.is_symlink() and not path.parent.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def drop_cut_line(path: Path) -> None:
    """Remove a last line that a full disk or a power loss has cut, if the file exists."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def check_text(setting: str, path: Path) -> None:
    """Raise UserError if a path is no text: files and messages that name it are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{setting}: must be UTF-8, got {os.fsencode(path)!r}") from None
