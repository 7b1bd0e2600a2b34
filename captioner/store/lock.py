"""One writer at a time: the lock on an OUT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from captioner.errors import OutputError
from captioner.files import is_uri, local_path
from captioner.store.lease import leased

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def sole_writer(location: str) -> Iterator[Callable[[], None]]:
    """Hold OUT for this process, making it where it is not there; gives a function that raises OutputError where it is
    no longer held. Raises OutputError where another run holds it.

    The lock is the kernel's, on the directory itself: it ends with the process however that dies, and leaves no file.
    Object stores have none, nor file systems that cannot lock a directory (some NFS): there a marker in OUT that its
    owner keeps changing does the same, with a wait of some seconds after a crash.
    """
    if not location:
        yield _held
        return
    if location.startswith("hf://"):
        raise OutputError(f"{location}: hf:// can only be read; give an OUT on a disk, s3:// or gs://")
    if fcntl is None or is_uri(location):
        with leased(location) as lease:
            yield lease.check
        return
    path = local_path(location)
    is_new = not os.path.lexists(path)
    try:
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{location} is no directory that can be used: {error}") from None
    try:
        if _lock(descriptor, location):
            yield _held
        else:
            with leased(location) as lease:
                yield lease.check
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # nothing came of the run: leave no empty directory behind
                os.rmdir(path)


def _lock(descriptor: int, location: str) -> bool:
    """Whether this file system has such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{location}: another run is writing to it; let it end, or give another OUT") from None
    except OSError:
        return False
    return True


def _held() -> None:
    """A lock of the kernel is not lost."""
