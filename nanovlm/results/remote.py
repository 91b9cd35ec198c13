"""Folders in a bucket, or wherever else pyarrow writes: `s3://bucket/path`, `gs://...`, `file://...`.

    remote = open_remote("--results", "s3://bucket/results")
    remote.child("digits").files()

pyarrow is loaded when a folder is opened, since most programs need none.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from nanovlm.errors import UserError
from nanovlm.files import PART_SUFFIX, user_path

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

_COPY_PREFIX = "nanovlm-copy-"
_CHUNK_BYTES = 16 * 2**20

_CONNECT_SECONDS, _REQUEST_SECONDS, _NUM_ATTEMPTS = 3.0, 15.0, 2
"""Of S3's client: without them it tries for minutes."""
_GCS_SECONDS = "8"
"""So long the client of Google's buckets tries again."""

_WHOLE_AT_ONCE = ("s3", "gcs", "abfs")
"""Kinds of stores in which a file is there when it is complete, and not before."""

FAILURES = (OSError, ValueError, NotImplementedError)
"""What pyarrow raises if a place cannot be reached, or not be used."""

_REMEDIES = {
    "s3": (
        "the bucket must exist and be writable with the credentials of AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, of ~/.aws/credentials or of the machine's role; AWS_ENDPOINT_URL, "
        "or ?endpoint_override=HOST:PORT&scheme=http after the path, names another server than "
        "Amazon's"
    ),
    "gs": (
        "the bucket must exist and be writable with the credentials of "
        "GOOGLE_APPLICATION_CREDENTIALS or of the machine"
    ),
}
_REMEDY = "choices: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH and what else pyarrow.fs opens"


def is_uri(text: str) -> bool:
    """Return whether a person means a place such as s3://bucket/path, and no local path."""
    return _URI.match(text) is not None


def reason_of(error: Exception) -> str:
    """Return the first line of an error of pyarrow, which has whole logs."""
    return str(error).strip().split("\n")[0].rstrip(".")[:300]


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in a bucket; it need not exist. Its methods raise FAILURES."""

    filesystem: Any  # a pyarrow.fs.FileSystem
    path: str
    uri: str
    """As a person writes it; without a query."""
    query: str
    """The part of what the person wrote that begins with `?`."""

    def child(self, name: str) -> "RemoteFolder":
        return replace(self, path=f"{self.path}/{name}", uri=f"{self.uri}/{name}")

    def address(self, name: str = "") -> str:
        """Return how a person names a file in it."""
        return f"{self.uri}{name and '/'}{name}{self.query}"

    def names(self) -> set[str]:
        """Return the names of the folders and files directly in it."""
        return {info.base_name for info in self._list(recursive=False)}

    def files(self) -> list[str]:
        """Return the paths of all files in it, relative."""
        return [info.path.removeprefix(f"{self.path}/") for info in self._list() if info.is_file]

    def _list(self, recursive: bool = True) -> Sequence[Any]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found: Sequence[Any] = self.filesystem.get_file_info(selector)
        return found

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as source:
            content: bytes = source.read()
        return content

    def download(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files, by their relative paths, into a local folder."""
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                self.filesystem.open_input_stream(f"{self.path}/{name}") as source,
                path.open("wb") as file,
            ):
                while chunk := source.read(_CHUNK_BYTES):
                    file.write(chunk)

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a file as a whole: others find the old one or the new one."""
        path = f"{self.path}/{name}"
        if self.filesystem.type_name in _WHOLE_AT_ONCE:
            self._write(path, source)
            return
        folder, _, base = path.rpartition("/")
        part = f"{folder}/.{base}{PART_SUFFIX}"
        self.filesystem.create_dir(folder)
        self._write(part, source)
        self.filesystem.move(part, path)

    def _write(self, path: str, source: bytes | Path) -> None:
        if isinstance(source, bytes):
            with self.filesystem.open_output_stream(path) as target:
                target.write(source)
            return
        with source.open("rb") as file, self.filesystem.open_output_stream(path) as target:
            while chunk := file.read(_CHUNK_BYTES):
                target.write(chunk)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        from pyarrow.fs import FileType

        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type == FileType.File:
            self.filesystem.delete_file(path)

    def clear(self) -> None:
        """Remove it with all that is in it."""
        if self.names():
            self.filesystem.delete_dir(self.path)


def open_remote(setting: str, uri: str, will_write: bool = False) -> RemoteFolder:
    """Return the folder at `uri`.

    Args:
        setting: the one that holds `uri`, for messages.
        will_write: check that files can be written and removed there.

    Raises:
        UserError: it cannot be reached or used; after some ten seconds at the latest.
    """
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise UserError(f"{setting}: a URI must not hold credentials; {_REMEDIES['s3']}")
    query = f"?{parts.query}" if parts.query else ""
    plain = uri.removesuffix(query).rstrip("/")
    try:
        filesystem, path = _connect(parts)
        remote = RemoteFolder(filesystem, path.rstrip("/"), plain, query)
        _check(remote, will_write)
    except FAILURES as error:
        remedy = _REMEDIES.get(parts.scheme.lower(), _REMEDY)
        raise UserError(f"{setting}: {uri} cannot be used: {reason_of(error)}; {remedy}") from error
    return remote


def _check(remote: RemoteFolder, will_write: bool) -> None:
    """Raise an error if the bucket is not there, or may not be written."""
    from pyarrow.fs import FileType

    bucket = remote.path.split("/")[0]
    if bucket and remote.filesystem.get_file_info(bucket).type == FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket!r}")
    if will_write:
        probe = f".nanovlm-{os.getpid()}"
        remote.put(probe, b"")
        remote.remove(probe)


def _connect(parts: SplitResult) -> tuple[Any, str]:
    """Return the file system and the path of a URI."""
    from pyarrow import fs

    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    path = f"{parts.netloc}{parts.path}"
    if parts.scheme.lower() == "s3":
        if not parts.netloc:
            raise ValueError("it names no bucket")
        return fs.S3FileSystem(**_s3_options(parts.netloc, options)), path
    uri = parts.geturl()
    if parts.scheme.lower() in ("gs", "gcs") and "retry_limit_seconds" not in options:
        uri += f"{'&' if parts.query else '?'}retry_limit_seconds={_GCS_SECONDS}"
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path


def _s3_options(bucket: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of S3FileSystem."""
    from pyarrow import fs

    known = {"endpoint_override", "scheme", "region"}
    if unknown := options.keys() - known:
        raise ValueError(f"unknown: {', '.join(unknown)}; choices: {', '.join(sorted(known))}")
    found: dict[str, Any] = dict(options)
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if given and "endpoint_override" not in found:
        endpoint = urlsplit(given)
        found |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    if "region" not in found:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and "endpoint_override" not in found:
            region = fs.resolve_s3_region(bucket)
        found["region"] = region or "us-east-1"
    return found | {
        "connect_timeout": _CONNECT_SECONDS,
        "request_timeout": _REQUEST_SECONDS,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_NUM_ATTEMPTS),
    }


def local_copy(setting: str, place: str | Path, without: Sequence[str] = ()) -> Path:
    """Return a local folder or file with what is at `place`; a path is itself.

    The copy of what is at a URI is removed when the program ends.

    Args:
        setting: the one that holds `place`, for messages.
        without: folders in it that are not wanted.

    Raises:
        UserError: there is nothing, or it cannot be reached.
    """
    if not is_uri(str(place)):
        return user_path(place)
    remote = open_remote(setting, str(place))
    root = Path(tempfile.mkdtemp(prefix=_COPY_PREFIX))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    copy = root / (remote.path.rpartition("/")[2] or "results")
    try:
        if _is_file(remote):
            parent, _, name = remote.path.rpartition("/")
            copy.write_bytes(replace(remote, path=parent).read(name))
        else:
            wanted = [name for name in remote.files() if name.split("/")[0] not in without]
            remote.download(copy, wanted)
    except FAILURES as error:
        raise UserError(f"{setting}: {place} cannot be read: {reason_of(error)}") from error
    if not copy.exists():
        raise UserError(f"{setting}: there is nothing at {place}")
    return copy


def _is_file(remote: RemoteFolder) -> bool:
    return bool(remote.filesystem.get_file_info(remote.path).is_file)
