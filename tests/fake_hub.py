"""A hub on this machine: the endpoints that huggingface_hub and datasets really call.

    with FakeHub() as hub:
        commit = hub.add("model", "some/model", folder)
        ... HF_ENDPOINT=hub.url in a subprocess, or the fixture `hub` of tests/conftest.py

A repository is a list of commits, each with all its files. What is not there is answered as the
hub answers it, and whoever writes must bring a token. Files are sent as the hub did before Xet,
and taken by LFS, so HF_HUB_DISABLE_XET=1 must be set for an upload.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors", ".parquet")

Files = dict[str, bytes]


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def as_json(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), (("Content-Type", "application/json"),))


class HubError(Exception):
    """What is not there, or not allowed, with the code that the client looks at."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.answer = Answer(status, code.encode(), (("X-Error-Code", code),))


@dataclass
class Repository:
    id: str
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    """All files of each commit, by its hash, the oldest first."""

    def commit(self, files: Files) -> str:
        text = f"{self.id} {len(self.commits)}"
        name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = files
        return name

    def resolve(self, revision: str) -> str:
        name = list(self.commits)[-1] if revision == "main" else revision
        if name not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return name

    def info(self, revision: str) -> Answer:
        name = self.resolve(revision)
        siblings = [{"rfilename": path} for path in self.commits[name]]
        content = {"id": self.id, "sha": name, "siblings": siblings, "private": self.private}
        return as_json({**content, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, revision: str, folder: str, recursive: bool) -> Answer:
        files = self.commits[self.resolve(revision)]
        inside = [path for path in entries(files) if is_inside(path, folder, recursive)]
        if folder and not inside:
            raise HubError(404, "EntryNotFound")
        return as_json([describe(path, files) for path in inside])

    def paths_info(self, revision: str, paths: list[str]) -> Answer:
        files = self.commits[self.resolve(revision)]
        return as_json([describe(path, files) for path in paths if path in entries(files)])

    def file(self, revision: str, path: str) -> Answer:
        name = self.resolve(revision)
        if path not in self.commits[name]:
            raise HubError(404, "EntryNotFound")
        content = self.commits[name][path]
        return Answer(200, content, (("ETag", f'"{etag(path, content)}"'), ("X-Repo-Commit", name)))


def entries(files: Files) -> list[str]:
    """Return all files and the folders they lie in."""
    folders = {str(p) for path in files for p in PurePosixPath(path).parents if str(p) != "."}
    return sorted({*files, *folders})


def is_inside(path: str, folder: str, recursive: bool) -> bool:
    parents = [str(p) for p in PurePosixPath(path).parents]
    return (folder or ".") in (parents if recursive else parents[:1])


def etag(path: str, content: bytes) -> str:
    if path.endswith(LFS_ENDINGS):
        return hashlib.sha256(content).hexdigest()
    blob = f"blob {len(content)}\0".encode() + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def describe(path: str, files: Files) -> dict[str, Any]:
    if path not in files:
        return {"type": "directory", "path": path, "oid": 40 * "0", "size": 0}
    content = files[path]
    oid = etag(path, content)
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if not path.endswith(LFS_ENDINGS):
        return entry
    pointer = hashlib.sha1(oid.encode(), usedforsecurity=False).hexdigest()
    lfs = {"oid": oid, "size": len(content), "pointerSize": 130}
    return {**entry, "oid": pointer, "lfs": lfs}


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
KIND = r"(?P<kind>model|dataset)s"


class FakeHub:
    """Repositories, and the server that gives and takes them for as long as the context lasts."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        """Parts of files that were asked for: path, first and last byte."""
        """Method and path of each request, in their order."""
        self._uploaded: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", f"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", self._tree),
            ("POST", f"/api/{KIND}/{REPO}/paths-info/(?P<revision>[^/]+)", self._paths_info),
            ("POST", f"/api/{KIND}/{REPO}/preupload/[^/]+", self._preupload),
            ("POST", f"/api/{KIND}/{REPO}/commit/(?P<revision>[^/]+)", self._commit),
            ("GET", f"/api/{KIND}/{REPO}/revision/(?P<revision>[^/]+)", self._info),
            ("GET", f"/api/{KIND}/{REPO}", self._info),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", "/upload/(?P<oid>[0-9a-f]+)", self._lfs_upload),
            ("GET", f"/datasets/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._dataset),
            ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._model),
        ]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, repo: str, folder: Path) -> str:
        """Commit the files of a folder as they are; return the commit's hash."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.repositories.setdefault((kind, repo), Repository(repo)).commit(files)

    def answer(self, method: str, target: str, body: bytes, has_token: bool) -> Answer:
        """Return what the hub says to one request."""
        url = urlsplit(target)
        for wanted, pattern, route in self._routes:
            match = re.fullmatch(pattern, url.path)
            if match and wanted == ("GET" if method == "HEAD" else method):
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                is_write = route in (self._create, self._preupload, self._commit, self._lfs_batch)
                try:
                    if is_write and not has_token:
                        raise HubError(401, "Unauthorized")
                    return route(query=parse_qs(url.query), body=body, **groups)
                except HubError as error:
                    return error.answer
        return Answer(404)

    def _repository(self, kind: str, repo: str) -> Repository:
        if (kind, repo) not in self.repositories:
            raise HubError(401, "RepoNotFound")  # so that nobody learns what is private
        return self.repositories[kind, repo]

    def _info(self, kind: str, repo: str, revision: str = "main", **_: Any) -> Answer:
        return self._repository(kind, repo).info(revision)

    def _tree(
        self, kind: str, repo: str, revision: str, query: dict[str, list[str]], **rest: Any
    ) -> Answer:
        recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
        return self._repository(kind, repo).tree(revision, rest.get("path", ""), recursive)

    def _paths_info(self, kind: str, repo: str, revision: str, body: bytes, **_: Any) -> Answer:
        paths = parse_qs(body.decode()).get("paths", [])
        return self._repository(kind, repo).paths_info(revision, paths)

    def _model(self, repo: str, revision: str, path: str, **_: Any) -> Answer:
        return self._repository("model", repo).file(revision, path)

    def _dataset(self, repo: str, revision: str, path: str, **_: Any) -> Answer:
        return self._repository("dataset", repo).file(revision, path)

    def _create(self, body: bytes, **_: Any) -> Answer:
        wanted = json.loads(body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        kind = wanted.get("type", "model")
        if (kind, repo) in self.repositories:
            address = {"url": f"{self.url}/{repo}"}
            return as_json({"error": "You already created this repo", **address}, 409)
        private = wanted.get("visibility") == "private"
        repository = self.repositories[kind, repo] = Repository(repo, private)
        repository.commit({".gitattributes": b""})
        return as_json({"url": f"{self.url}/{repo}"})

    def _validate(self, body: bytes, **_: Any) -> Answer:
        _, head, _ = json.loads(body)["content"].split("---\n", 2)
        try:
            yaml.safe_load(head)
        except yaml.YAMLError as error:
            return as_json({"errors": [{"message": str(error)}]}, 400)
        return as_json({"errors": [], "warnings": []})

    def _preupload(self, kind: str, repo: str, body: bytes, **_: Any) -> Answer:
        self._repository(kind, repo)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_ENDINGS) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        return as_json({"files": files})

    def _lfs_batch(self, body: bytes, **_: Any) -> Answer:
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.url}/upload/{entry['oid']}"}}
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str, body: bytes, **_: Any) -> Answer:
        self._uploaded[oid] = body
        return Answer(200)

    def _commit(self, kind: str, repo: str, revision: str, body: bytes, **_: Any) -> Answer:
        repository = self._repository(kind, repo)
        files = dict(repository.commits[repository.resolve(revision)])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._uploaded[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        return as_json({"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit})


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            has_token = self.headers.get("Authorization") is not None
            status, body, headers = hub.answer(self.command, self.path, self._body(), has_token)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if wanted and status == 200:
                first, last = map(int, wanted.groups())
                status, body = 206, body[first : last + 1]
                hub.ranges.append((self.path, first, last))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            """Keep still."""

    return Handler
