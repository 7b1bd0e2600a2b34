"""Share requests out to model servers by what each has under way. A server that does not answer rests in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from captioner.errors import EndpointError
from captioner.models.endpoint.asking import BrokenError, BusyError

FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0
FAULTS_TO_TELL = 3  # in a row: about two seconds without an answer


@dataclass
class Server:
    """A model server as one worker sees it.

    `under_way`: requests. `faults`: requests in a row without an answer; while there are any, one request at a time
    finds out whether it answers again. `rests_until`, `busy_until`: by the pool's clock.
    """

    url: str
    under_way: int = 0
    faults: int = 0
    rests_until: float = 0.0
    busy_until: float = 0.0

    @property
    def free_from(self) -> float:
        return max(self.rests_until, self.busy_until)


class ServerPool:
    """The servers of a run. Used by one event loop.

    `concurrency`: requests under way at each. `timeout`: seconds without an answer of any server after which
    EndpointError is raised. `notify`: called with a line when a server stops answering or answers again. `clock`:
    monotonic seconds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        concurrency: int,
        timeout: float,
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers = [Server(url) for url in urls]
        self._concurrency, self._timeout, self._notify, self._clock = concurrency, timeout, notify, clock
        self._changed = asyncio.Condition()
        self._silent_since: float | None = None  # the first fault since the last answer
        self._last_reason = ""

    async def take(self) -> Server:
        """Wait for a free server and return it; `release` gives it back. Raises EndpointError after the timeout."""
        async with self._changed:
            while (server := self.free()) is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds_to_wait()):
                        await self._changed.wait()
            server.under_way += 1
            return server

    async def release(self, server: Server) -> None:
        async with self._changed:
            server.under_way -= 1
            self._changed.notify_all()

    def answered(self, server: Server) -> None:
        """Note that a server answered: it does not rest any more, unless it asked for that itself."""
        if server.faults >= FAULTS_TO_TELL:
            self._notify(f"{server.url} answers again")
        server.faults, server.rests_until = 0, 0.0
        self._silent_since = None

    def failed(self, server: Server, error: BrokenError | BusyError) -> None:
        """Let a server rest that did not answer: for as long as it asks, or each time longer where it names no time.

        Requests that fail together count as one.
        """
        now = self._clock()
        self._note(server, str(error), now)
        seconds = (error.seconds or 0.0) if isinstance(error, BusyError) else 0.0
        if seconds >= FIRST_REST_S:
            if seconds >= LONGEST_REST_S and server.busy_until < now:
                self._notify(f"{server.url} asks for a rest of {seconds:.0f} s ({error})")
            server.busy_until = max(server.busy_until, now + seconds)
        elif now >= server.rests_until:
            server.faults += 1
            server.rests_until = now + min(LONGEST_REST_S, FIRST_REST_S * 2 ** (server.faults - 1))
            if server.faults == FAULTS_TO_TELL:
                self._notify(f"{server.url} does not answer ({error}); it is asked again until it does")

    def _note(self, server: Server, reason: str, now: float) -> None:
        self._last_reason = f"{server.url}: {reason}"
        if self._silent_since is None:
            self._silent_since = now

    def free(self) -> Server | None:
        """Return the server with the fewest requests among those that may get one; None where none may."""
        now = self._clock()
        self._check_timeout(now)
        free = [server for server in self.servers if server.free_from <= now and self._has_room(server)]
        return min(free, key=lambda server: (server.under_way, server.faults), default=None)

    def _has_room(self, server: Server) -> bool:
        return server.under_way < (1 if server.faults else self._concurrency)

    def _check_timeout(self, now: float) -> None:
        if self._silent_since is not None and now - self._silent_since >= self._timeout:
            raise EndpointError(
                f"no --endpoint has answered for {self._timeout:g} s (--endpoint-timeout); {self._last_reason}; "
                "progress is saved; run the same command to continue"
            )

    def _seconds_to_wait(self) -> float | None:
        """Return the seconds until a server's rest ends or the timeout is over; None for neither."""
        now = self._clock()
        ends = [server.free_from - now for server in self.servers if server.free_from > now]
        if self._silent_since is not None:
            ends.append(self._silent_since + self._timeout - now)
        return max(0.001, min(ends)) if ends else None
