"""One writer at a time where there is no lock: a marker that its owner keeps changing."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from captioner.errors import OutputError
from captioner.files import shown
from captioner.store.directory import LEASE_FILE, Directory

BEAT_S = 5.0
# A marker that has not changed for so long is that of a dead run. Nobody's clock is compared with another's.
SILENT_S = 4 * BEAT_S
_SETTLE_S = 1.0
_sleep = time.sleep  # replaced in tests


class Lease:
    """OUT is this run's while the marker is. `check` tells whether it still is."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._owner = {"owner": uuid.uuid4().hex, "machine": _machine(), "pid": os.getpid()}
        self._beats = 0
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Raises OutputError where another run has it, or nothing can be read. Waits SILENT_S for one that may be
        dead."""
        try:
            found = self._read()
        except OSError as error:
            raise OutputError(f"{shown(self._directory.location)} cannot be read: {error}") from error
        if found is not None and not _is_dead_here(found):
            self._wait_for_silence(found)
        self._beat()
        _sleep(_SETTLE_S)  # another that starts in this moment has written its own by now: the last one holds
        if not self._is_mine():
            raise self._refusal()
        self._thread.start()

    def check(self) -> None:
        """Raises OutputError where another run has taken OUT over: this one was silent for too long."""
        if self._lost:
            raise OutputError(f"{shown(self._directory.location)} was taken over by another run; this one stops")

    def give_back(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError, OutputError):
            if self._is_mine():
                self._directory.delete(LEASE_FILE)

    def _wait_for_silence(self, found: dict[str, Any]) -> None:
        for _ in range(round(SILENT_S)):
            _sleep(1.0)
            now = self._read()
            if now is None:
                return
            if now != found:
                raise self._refusal()

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError, OutputError):  # a store that does not answer now may do so at the next beat
                if not self._is_mine():
                    self._lost = True
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._directory.write_json(LEASE_FILE, {**self._owner, "beat": self._beats})

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["owner"] == self._owner["owner"]

    def _read(self) -> dict[str, Any] | None:
        return self._directory.read_json(LEASE_FILE) if self._directory.exists(LEASE_FILE) else None

    def _refusal(self) -> OutputError:
        place = shown(self._directory.location)
        return OutputError(f"{place}: another run is writing to it; let it end, or give another OUT")


@contextmanager
def leased(location: str) -> Iterator[Lease]:
    """Hold OUT by a marker in it. Raises OutputError where another run holds it."""
    lease = Lease(Directory(location))
    try:
        lease.take()
        yield lease
    finally:
        lease.give_back()


def _is_dead_here(found: dict[str, Any]) -> bool:
    """Whether it is the marker of a process of this machine that is no more."""
    if not _machine() or found["machine"] != _machine():
        return False
    try:
        os.kill(found["pid"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _machine() -> str:
    """Where a process number means the same process; "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
