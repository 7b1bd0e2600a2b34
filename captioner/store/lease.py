"""Exclusive access to OUT where a file system has no locks: a marker file that its owner keeps rewriting."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from captioner.errors import OutputError
from captioner.files import shown
from captioner.store.directory import LEASE_FILE, Directory


class Lease:
    """Holds OUT exclusively by a marker file in it.

    Class attributes: `beat_s`, seconds between two rewrites of the marker; `silent_s`, seconds without a change after
    which its owner counts as dead (clocks of different machines are never compared); `settle_s`, seconds after which
    two runs that start at once see each other's marker.
    """

    beat_s: ClassVar[float] = 5.0
    silent_s: ClassVar[float] = 20.0
    settle_s: ClassVar[float] = 1.0

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._owner = {"owner": uuid.uuid4().hex, "machine": this_machine(), "pid": os.getpid()}
        self._beats = 0
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @staticmethod
    def sleep(seconds: float) -> None:
        """Wait before another run's marker is read again."""
        time.sleep(seconds)

    def acquire(self) -> None:
        """Write the marker, after waiting `silent_s` for an owner that may be dead.

        Raises OutputError where another run holds OUT, or nothing can be read.
        """
        marker = self._read()
        if marker is not None and not _is_dead_here(marker):
            self._wait_for_silence(marker)
        self._beat()
        self.sleep(self.settle_s)  # another run that starts now has overwritten the marker by then: the last one holds
        if not self._is_mine():
            raise self._refusal()
        self._thread.start()

    def check(self) -> None:
        """Raise OutputError where another run has taken OUT over, because this one was silent for too long."""
        if self._lost.is_set():
            raise OutputError(f"{shown(self._directory.location)} was taken over by another run; this one stops")

    def wait_until_lost(self, timeout: float) -> bool:
        """Return whether another run takes OUT over within `timeout` seconds."""
        return self._lost.wait(timeout)

    def release(self) -> None:
        """Stop rewriting the marker, and delete it if it is still ours."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError, OutputError):
            if self._is_mine():
                self._directory.delete(LEASE_FILE)

    def _wait_for_silence(self, marker: dict[str, Any]) -> None:
        for _ in range(round(self.silent_s)):
            self.sleep(1.0)
            current = self._read()
            if current is None:
                return
            if current != marker:
                raise self._refusal()

    def _keep(self) -> None:
        while not self._ended.wait(self.beat_s):
            with suppress(OSError, OutputError):  # a store that does not answer now may answer at the next beat
                if not self._is_mine():
                    self._lost.set()
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._directory.write_json(LEASE_FILE, {**self._owner, "beat": self._beats})

    def _is_mine(self) -> bool:
        marker = self._read()
        return marker is not None and marker["owner"] == self._owner["owner"]

    def _read(self) -> dict[str, Any] | None:
        if not self._directory.exists(LEASE_FILE):
            return None
        marker = self._directory.read_record(LEASE_FILE)  # a damaged one has an owner that nobody knows
        return {name: marker.get(name, "") for name in (*self._owner, "beat")}

    def _refusal(self) -> OutputError:
        location = shown(self._directory.location)
        return OutputError(f"{location}: another run is writing to it; wait until it ends, or give another OUT")


@contextmanager
def leased(location: str) -> Iterator[Lease]:
    """Hold OUT by a marker in it. Raises OutputError where another run holds it."""
    lease = Lease(Directory(location))
    try:
        lease.acquire()
        yield lease
    finally:
        lease.release()


def is_leased(location: str) -> bool:
    """Return whether there is a marker that is not of a dead process of this machine. Raises OutputError."""
    directory = Directory(location)
    return directory.exists(LEASE_FILE) and not _is_dead_here(directory.read_json(LEASE_FILE))


def this_machine() -> str:
    """Return a name of the machine within which a process id is unique, or "" where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead_here(marker: dict[str, Any]) -> bool:
    """Return whether the marker is that of a process of this machine that has ended."""
    if not this_machine() or marker["machine"] != this_machine():
        return False
    try:
        os.kill(int(marker["pid"]), 0)
    except (OSError, ValueError) as error:
        return isinstance(error, ProcessLookupError)
    return False
