"""Deaths on order, for tests of what survives them. `captioner.testing` exports them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from captioner.data import DecodedImage
from captioner.store.directory import Directory

# A picture whose bytes hold one of these kills its decoder, or keeps it for ever, where the environment variable
# CAPTIONER_TEST_POISON is set. Everywhere else they are bytes like others.
ABORT_MARKER, HANG_MARKER = b"captioner-test: abort", b"captioner-test: hang"
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


def poisoned(decode_one: Callable[[bytes], DecodedImage]) -> Callable[[bytes], DecodedImage]:
    """A decoder with a weakness for the markers."""

    def decode(data: bytes) -> DecodedImage:
        if ABORT_MARKER in data:
            os.kill(os.getpid(), signal.SIGABRT)
        while HANG_MARKER in data:
            time.sleep(3600)
        return decode_one(data)

    return decode
