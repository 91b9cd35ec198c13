"""Joining a Ray cluster that is there already: finding it, and whether it can be joined.

Ray itself tries for up to a minute and a half, and ends with pages of logs; here each obstacle is
found within seconds, and said in one message.
"""

import contextlib
import os
import pwd
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from nanovlm.cluster.jobs import token_file
from nanovlm.cluster.ray_compat import (
    answer_of,
    first_line,
    has_token,
    last_started_cluster,
    local_nodes,
    on_loopback,
    set_auth_mode,
)
from nanovlm.errors import UserError

_HOST_PORT = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})")
_HERE = ("localhost", "127.0.0.1", "[::1]")
_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 5
_REFUSED = "UNAUTHENTICATED"

_START = "`ray start --head` starts a cluster and prints its address"


@dataclass(frozen=True)
class ExistingCluster:
    """A cluster that answers and may be joined."""

    address: str
    """HOST:PORT, as Ray takes it."""
    owner: str
    """Whose nodes on this machine are."""
    asks_for_token: bool

    def describe(self) -> str:
        """Return whose it is and what it has; only when it is joined."""
        token = "" if self.asks_for_token else ", open to all who reach it (no token)"
        return f"joined Ray cluster at {self.address} ({self.owner}): {describe_nodes()}{token}"


def describe_nodes() -> str:
    """Return how many nodes the joined cluster has, and what they have."""
    have = ray.cluster_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    nodes = "1 node" if num_nodes == 1 else f"{num_nodes} nodes"
    return f"{nodes}, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"


@contextlib.contextmanager
def admission(address: str) -> Iterator[ExistingCluster]:
    """Find the cluster at `address`; meanwhile Ray can join it, with a token if it asks for one.

    Args:
        address: HOST:PORT, or `auto` for the user's own one on this machine, or that of the
            environment variable RAY_ADDRESS.

    Raises:
        UserError: there is none, or it does not let this program in; with what to do.
    """
    if address == "auto":
        given = os.environ.get("RAY_ADDRESS", "")
        address = _find_own() if given in ("", "auto", "local") else given
    host, port = _split(address)
    with contextlib.ExitStack() as stack:
        if host in _HERE:
            host = _address_of_this_machine(port)
            if host == _LOOPBACK:
                stack.enter_context(on_loopback())
        _check_listens(host, port, address)
        target = f"{host}:{port}"
        asks_for_token = _asks_for_token(target, os.environ.get("RAY_AUTH_MODE"))
        yield ExistingCluster(target, _owner_here(target), asks_for_token)


def explain_failure(address: str, error: Exception) -> str:
    """Return in one message why Ray could not join the cluster at `address`."""
    if "mismatch" in str(error):
        detail = " ".join(str(error).split())
        return (
            f"--address: the Ray cluster at {address} is of another version, and all machines "
            f"need the same Python and the same packages (requirements.lock): {detail}"
        )
    return f"--address: the Ray cluster at {address} cannot be joined: {first_line(error)}"


def _split(address: str) -> tuple[str, str]:
    if address.startswith("ray://"):
        raise UserError(
            f"--address: {address!r} is an address of Ray Client, through which no search can run; "
            "on a machine of the cluster give auto, or HOST:PORT as `ray start --head` prints it "
            "(port 6379 by default)"
        )
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise UserError(
            "--address: must be HOST:PORT, or auto for your cluster on this machine, got "
            f"{address!r}; {_START} (port 6379 by default)"
        )
    return match["host"], match["port"]


def _find_own() -> str:
    """Return the address of the user's cluster on this machine: the one of the last `ray start` if
    there are several."""
    nodes = local_nodes()
    own = sorted({node.cluster for node in nodes if node.user_id == os.getuid()})
    if not own and nodes:
        others = {f"{node.cluster} of {user_name(node.user_id)}" for node in nodes}
        raise UserError(
            "--address: auto joins your own Ray cluster on this machine, and there are only those "
            f"of others: {', '.join(sorted(others))}. Give its address to join one all the same: "
            f"--address {nodes[0].cluster}; {_START}; without --address the run starts a cluster "
            "of its own"
        )
    if not own:
        raise UserError(
            f"--address: auto found no Ray cluster on this machine; {_START}; without --address "
            "the run starts a cluster of its own"
        )
    last = last_started_cluster()
    if last in own:
        return last
    if len(own) > 1:
        raise UserError(
            f"--address: auto found {len(own)} Ray clusters of yours on this machine; give the "
            f"address of one: {', '.join(own)}"
        )
    return own[0]


def _address_of_this_machine(port: str) -> str:
    """Return the address under which Ray knows this machine; loopback for a cluster that listens
    there alone."""
    known: str = ray.util.get_node_ip_address()
    with contextlib.suppress(OSError):
        socket.create_connection((known, int(port)), timeout=_CONNECT_SECONDS).close()
        return known
    return _LOOPBACK


def _check_listens(host: str, port: str, address: str) -> None:
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except socket.gaierror as error:
        raise UserError(
            f"--address: no machine is known here by the name {host!r} of {address!r} "
            f"({error.strerror}); check its spelling, or give the IP address"
        ) from None
    except ConnectionRefusedError:
        raise UserError(
            f"--address: no Ray cluster answers at {address!r}: nothing listens there. {_START}"
        ) from None
    except OSError as error:
        raise UserError(
            f"--address: no Ray cluster answers at {address!r}: {error.strerror or error}. Check "
            "the address, and whether a firewall is between the machines"
        ) from None


def _asks_for_token(target: str, mode: str | None) -> bool:
    """Return whether the cluster asks for a token, and set Ray's mode accordingly: with another one
    than the cluster's, Ray joins it and then waits for actors that never start.

    Args:
        mode: what the user has set in RAY_AUTH_MODE.
    """
    set_auth_mode("disabled")
    answer = answer_of(target, _CONNECT_SECONDS)
    if answer != _REFUSED:
        _check_is_ray(target, answer)
        if mode == "token":
            raise UserError(
                f"RAY_AUTH_MODE: is token, but the Ray cluster at {target} asks for none, so that "
                "all who reach it can run code there. Start it again with RAY_AUTH_MODE=token, or "
                "unset RAY_AUTH_MODE to join it as it is"
            )
        return False
    asks = f"the Ray cluster at {target} asks for its token"
    if mode == "disabled":
        raise UserError(f"RAY_AUTH_MODE: is disabled, but {asks}; unset RAY_AUTH_MODE")
    copy = "copy ~/.ray/auth_token from the machine of `ray start --head`, readable for you alone"
    if not has_token():
        raise UserError(f"--address: {asks}, and there is none in {token_location()}; {copy}")
    set_auth_mode("token")
    answer = answer_of(target, _CONNECT_SECONDS)
    if answer == _REFUSED:
        raise UserError(f"--address: {asks}, and {token_location()} has another one; {copy}")
    _check_is_ray(target, answer)
    return True


def _check_is_ray(target: str, answer: str) -> None:
    if answer != "OK":
        raise UserError(
            f"--address: what listens at {target} is no Ray cluster (its answer: {answer}); "
            "give the address that `ray start --head` prints (port 6379 by default), not that of "
            "its dashboard (8265) or of Ray Client (10001)"
        )


def token_location() -> str:
    """Return where Ray looks for the token: an environment variable, or a file."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return str(token_file())


def _owner_here(target: str) -> str:
    """Return whose the cluster's nodes on this machine are. Raises UserError if there is none."""
    port = target.rpartition(":")[2]  # the host may have other names on other machines
    owners = {n.user_id for n in local_nodes() if n.cluster.rpartition(":")[2] == port}
    if not owners:
        raise UserError(
            f"--address: this machine is no node of the Ray cluster at {target}, so it cannot run "
            f"a search there; make it one: ray start --address={target}"
        )
    return "yours" if owners == {os.getuid()} else f"of {user_name(min(owners))}"


def user_name(user_id: int) -> str:
    """Return the name of a user of this machine."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return f"the user with id {user_id}"
