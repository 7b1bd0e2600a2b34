"""Follow a submitted job to its end: copy its log, return its exit code, handle Ctrl-C and lost connections."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from captioner.console.stopping import notify
from captioner.errors import ERROR, INTERRUPTED, OK, TERMINATED, ClusterError
from ray_jobs.address import is_refused, needs_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 1.0
LOST_S = 300.0  # the cluster counts as gone after this time without an answer


class Follower:
    """Writes a job's log to standard output, each character once, over one or several connections.

    `waits_for`: what the job needs before it starts, for the message when `pending_timeout` seconds have passed.
    """

    def __init__(self, client: JobSubmissionClient, job_id: str, waits_for: str, pending_timeout: float) -> None:
        self._client, self._job_id, self._waits_for = client, job_id, waits_for
        self._pending_timeout = pending_timeout
        self._written = 0
        self._last_answer = time.monotonic()

    def run(self, announcement: str) -> int:
        """Return the exit code of the job's command. Raises ClusterError where it never starts or the cluster is lost.

        `announcement` is printed first; from then on Ctrl-C asks whether to stop the job.
        """
        try:
            notify(announcement)
            self._wait_for_start()
            while str((info := self._info()).status) not in ENDED:
                self._copy_log()
                time.sleep(POLL_S / 4)
            self._copy_log()
            return self._exit_code(info)
        except KeyboardInterrupt:
            return self._stop_or_detach()

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + self._pending_timeout
        while str(self._info().status) == "PENDING":
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self._job_id} has waited {self._pending_timeout:g} s for {self._waits_for}; it stays queued: "
                    f"run the same command to keep waiting, or `ray job stop {self._job_id}` to give up"
                )
            time.sleep(POLL_S / 4)

    def _info(self) -> Any:
        """Return the job's details; ask again while the cluster does not answer."""
        while True:
            try:
                with reaching(self._client.get_address()):
                    info = self._client.get_job_info(self._job_id)
                self._last_answer = time.monotonic()
                return info
            except ClusterError as error:
                if time.monotonic() - self._last_answer > LOST_S:
                    raise ClusterError(
                        f"{error}; {self._job_id} may still run; run the same command to follow it"
                    ) from error
                time.sleep(POLL_S)

    def _copy_log(self) -> None:
        """Copy new text until the connection ends, for any reason."""
        import aiohttp

        try:
            asyncio.run(self._tail())
        except (aiohttp.ClientError, OSError, RuntimeError):
            return  # `run` checks the state of the job and calls this again

    async def _tail(self) -> None:
        seen = 0  # every connection starts at the beginning of the log
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._written - seen) :]
            seen += len(text)
            if new:
                self._written = seen
                sys.stdout.write(new)
                sys.stdout.flush()

    def _exit_code(self, info: Any) -> int:
        status, code = str(info.status), info.driver_exit_code
        if status == "SUCCEEDED":
            return OK
        if status == "STOPPED":
            notify(f"{self._job_id} was stopped; run the same command to continue")
            return TERMINATED
        if code is None:  # its command never ran
            raise ClusterError(f"{self._job_id} failed: {' '.join((info.message or 'no message').split())[-400:]}")
        notify(f"{self._job_id} ended with exit code {code}")
        return 128 - code if code < 0 else code or ERROR

    def _stop_or_detach(self) -> int:
        try:
            wants_stop = sys.stdin.isatty() and input("\nStop the job? [y/N] ").strip().lower().startswith("y")
        except (EOFError, KeyboardInterrupt):
            wants_stop = False
        if not wants_stop:
            notify(
                f"detached: {self._job_id} still runs; run the same command to follow it, or "
                f"`ray job stop {self._job_id}` to stop it"
            )
            return INTERRUPTED
        with reaching(self._client.get_address()):
            self._client.stop_job(self._job_id)
        while str(self._info().status) not in ENDED:
            time.sleep(POLL_S / 4)
        notify(f"{self._job_id} is stopped; run the same command to continue")
        return INTERRUPTED


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Raise the client's errors as a ClusterError of one line, with a hint where a token is missing or wrong."""
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError) as error:
        text = " ".join(str(error).split())
        if is_refused(text):
            raise needs_token(address) from error
        raise ClusterError(f"{address}: {text[-400:]}") from error
