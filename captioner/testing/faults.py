"""Deaths on order, for tests of what survives them. `captioner.testing` exports them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.imaging.sandbox.poison import wait_at
from captioner.store.directory import Directory

_WRITES = ("write_bytes", "delete", "delete_folder")


class Killed(BaseException):
    """The process would be dead from here on."""


@contextmanager
def killed_at_write(number: int) -> Iterator[None]:
    """Inside, the first `number - 1` writes and deletes in table directories happen; the next one and all after it do
    not, and each raises Killed: what is on disk is what a process killed at that moment leaves there."""

    def die() -> None:
        raise Killed

    with _at_write(number, die):
        yield


@contextmanager
def sigkill_at_write(number: int) -> Iterator[None]:
    """Inside, this process kills itself with SIGKILL at its `number`-th write or delete in a table directory, before it
    happens. Other processes, Ray's workers among them, live on."""
    with _at_write(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        yield


@contextmanager
def _at_write(number: int, die: Callable[[], None]) -> Iterator[None]:
    done = 0

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done >= number:
                die()
            return write(*args, **kwargs)

        return wrapper

    before = {name: getattr(Directory, name) for name in _WRITES}
    for name, write in before.items():
        setattr(Directory, name, counted(write))
    try:
        yield
    finally:
        for name, write in before.items():
            setattr(Directory, name, write)


@dataclass(frozen=True)
class GatedDirectory(Directory):
    """A directory whose first write of a chunk waits, in whichever process does it, so that a test can end that process
    at this very moment.

    `gate`: a local directory. `pid` in it then holds the number of the process that waits; `open` lets it go on.
    `moment`: "before" or "after" the file is in its place.
    """

    gate: str = ""
    moment: str = "before"

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "gate": self.gate, "moment": self.moment}

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """As `Directory.write_bytes`, with the wait."""
        waits = name.startswith("chunks/")
        if waits and self.moment == "before":
            wait_at(self.gate)
        super().write_bytes(name, data)
        if waits and self.moment == "after":
            wait_at(self.gate)
