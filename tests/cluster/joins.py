"""Tries to join a cluster in one way after another, in a process that is connected to none.

    python -m tests.cluster.joins ADDRESS HOME_WITH_TOKEN HOME_WITHOUT

Prints what each try comes to, as lines of JSON: its name, what was said, and the seconds it took.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from unittest.mock import patch

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from nanovlm.cluster import joining
from nanovlm.cluster.ray_cluster import connect
from nanovlm.errors import UserError

METADATA, NAMESPACE = b"CLUSTER_METADATA", b"cluster"
"""Where Ray keeps the versions of a cluster."""


def attempt(name: str, address: str, home: str, **environment: str) -> None:
    """Join, or try to, with a home directory and nothing else that tells of tokens."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    began = time.monotonic()
    with patch.dict(os.environ, {**others, "HOME": home, **environment}, clear=True):
        try:
            with connect(address) as cluster:
                said = cluster.description
        except UserError as error:
            said = f"error: {error}"
    print(json.dumps([name, said, time.monotonic() - began]), flush=True)


@contextlib.contextmanager
def other_version(address: str, home: str, **changes: str) -> Iterator[None]:
    """Have the cluster say meanwhile that it was started with other versions."""

    def put(value: bytes) -> bytes:
        with patch.dict(os.environ, HOME=home), connect(address):
            before = bytes(_internal_kv_get(METADATA, namespace=NAMESPACE))
            new = value or json.dumps({**json.loads(before), **changes}).encode()
            _internal_kv_put(METADATA, new, overwrite=True, namespace=NAMESPACE)
        return before

    before = put(b"")
    yield
    with patch("ray._private.utils.check_version_info"):
        put(before)


def main(address: str, home: str, stranger: str) -> None:
    attempt("no token", address, stranger)
    attempt("wrong token", address, stranger, RAY_AUTH_TOKEN="0" * 64)
    attempt("token is off", address, home, RAY_AUTH_MODE="disabled")
    attempt("no file", address, stranger, RAY_AUTH_TOKEN_PATH="/nowhere/token")
    attempt("RAY_ADDRESS", "auto", home, RAY_ADDRESS=address)
    with patch("os.getuid", lambda: 987654):
        attempt("another user's", "auto", home)
        attempt("another user's by address", address, home)
    with patch.object(joining, "local_nodes", lambda: []):
        attempt("not a node", address, home)
        attempt("none here", "auto", home)
    with other_version(address, home, ray_version="1.13.0"):
        attempt("other Ray", address, home)
    with other_version(address, home, python_version="3.9.1"):
        attempt("other Python", address, home)
    attempt("address", address, home)
    attempt("auto", "auto", home)


if __name__ == "__main__":
    main(*sys.argv[1:])
