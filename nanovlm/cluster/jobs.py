"""Jobs of a Ray cluster: handing a program over to it, following its log, how it ended.

The machine that hands a job over does not join the cluster: all goes over HTTP to the cluster's
dashboard. Ray runs the program on the head, and sends the working directory to each node.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovlm import process
from nanovlm.errors import RunFailed, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_SECONDS = 120
"""How long `ray job stop` waits for the program to end in order. Ray's default is 3."""
_ANSWER_SECONDS = 10.0
_AGENT_SECONDS = 60.0
"""A head that has just started takes no jobs yet."""
_LOST_SECONDS = 120.0
_POLL_SECONDS = 1.0


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: of the cluster's dashboard, such as `http://HEAD:8265`.

        Raises:
            UserError: no Ray dashboard is there, it refuses, or its Ray is of another version.
        """
        self.address = address.rstrip("/")
        headers = auth_headers()
        check_dashboard(self.address, headers)
        # Imported late: Ray takes a second, and most mistakes in an address are found by now.
        from ray.job_submission import JobSubmissionClient

        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # else RAY_ADDRESS would win
        self._client: JobSubmissionClient = JobSubmissionClient(self.address, headers=headers)

    def submit(self, entrypoint: str, folder: Path) -> str:
        """Have the cluster run a command in a copy of the folder; return the job's id.

        Raises:
            UserError: the cluster does not take it.
        """
        deadline = time.monotonic() + _AGENT_SECONDS
        environment = {
            "working_dir": str(folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        }
        while True:
            try:
                job_id: str = self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=environment
                )
                return job_id
            except Exception as error:  # Ray raises a RuntimeError for all that a server answers
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    reason = " ".join(str(error).split())
                    raise UserError(f"--submit: {self.address} takes no job: {reason}") from error
                time.sleep(_POLL_SECONDS)

    def follow(self, job_id: str, write: Callable[[str], object]) -> "JobDetails | None":
        """Pass on the log of a job until it has ended; return how, or None after a signal.

        A connection that is lost is made again.

        Raises:
            RunFailed: the cluster does not answer any more.
        """
        return asyncio.run(_Follower(self._client, job_id, write).run())


class _Follower:
    """Follows one job, in an event loop that a signal ends."""

    def __init__(
        self, client: "JobSubmissionClient", job_id: str, write: Callable[[str], object]
    ) -> None:
        self._client = client
        self._job_id = job_id
        self._write = write
        self._num_written = 0

    async def run(self) -> "JobDetails | None":
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(self._follow())

        def stop() -> None:
            loop.call_soon_threadsafe(task.cancel)

        with process.in_order(stop):
            try:
                return await task
            except asyncio.CancelledError:
                return None

    async def _follow(self) -> "JobDetails":
        import aiohttp  # late, as Ray is

        answered_at = time.monotonic()
        while True:
            try:
                await self._tail()
                details: JobDetails = await asyncio.to_thread(
                    self._client.get_job_info, self._job_id
                )
                if details.status.is_terminal():
                    return details
                answered_at = time.monotonic()
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                if time.monotonic() - answered_at > _LOST_SECONDS:
                    raise RunFailed(
                        f"the cluster has not answered for {_LOST_SECONDS:.0f} s: {error}"
                    ) from error
            await asyncio.sleep(_POLL_SECONDS)

    async def _tail(self) -> None:
        """Write what is new in the log, which Ray sends from its beginning."""
        num_read = 0
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._num_written - num_read) :]
            num_read += len(text)
            self._num_written = max(self._num_written, num_read)
            if new:
                self._write(new)


def check_dashboard(address: str, headers: dict[str, str]) -> None:
    """Raise UserError if there is no Ray dashboard at the address that serves this program."""
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--submit: must be the address of Ray's dashboard, http://HEAD:8265, got {address!r}"
        )
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            theirs = json.load(answer)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"--submit: {address} refuses {'the' if headers else 'a request without a'} token: "
                "have the cluster's, which `ray get-auth-token` prints on its head, in "
                "RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            ) from None
        raise UserError(f"--submit: no Ray dashboard at {address}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--submit: no Ray dashboard answers at {address}: {error}; `ray start --head "
            "--dashboard-host=0.0.0.0` opens it to other machines, at port 8265"
        ) from None
    ours = metadata.version("ray")
    if theirs != ours:
        raise UserError(
            f"--submit: the cluster at {address} runs Ray {theirs} and this machine {ours}; the "
            "program is tested with one version on all machines: requirements.lock has it"
        )


def auth_headers() -> dict[str, Any]:
    """Return the headers that carry this user's token of Ray; none without a token."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token:
        path = token_file()
        token = path.read_text().strip() if path.is_file() else ""
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_file() -> Path:
    """Return the file in which Ray looks for the token."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path.home() / ".ray" / "auth_token"
