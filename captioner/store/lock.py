"""One writer at a time: the lock on an OUT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from captioner.errors import OutputError
from captioner.files import is_uri, local_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def sole_writer(location: str) -> Iterator[None]:
    """Hold OUT for this process, making it where it is not there. Raises OutputError where another run holds it.

    The lock is the kernel's, on the directory itself: it ends with the process however that dies, and leaves no file.
    Object stores and file systems that cannot lock a directory (NFS) have none: there it is up to the people who
    start runs that each OUT has one.
    """
    if fcntl is None or is_uri(location) or not location:
        yield
        return
    path = local_path(location)
    is_new = not os.path.lexists(path)
    try:
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{location} is no directory that can be used: {error}") from None
    try:
        _lock(descriptor, location)
        yield
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # nothing came of the run: leave no empty directory behind
                os.rmdir(path)


def _lock(descriptor: int, location: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{location}: another run is writing to it; let it end, or give another OUT") from None
    except OSError:
        return  # this file system has no such locks
