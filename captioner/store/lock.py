"""The exclusive lock on OUT: one writer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from captioner.errors import OutputError
from captioner.files import is_uri, local_path
from captioner.store.lease import is_leased, leased

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def sole_writer(location: str) -> Iterator[Callable[[], None]]:
    """Hold an exclusive lock on OUT, and create OUT where there is none.

    Yields a function that raises OutputError once the lock is lost. Raises OutputError where another run holds it.

    The lock is the kernel's, on the directory itself: it ends with the process, however that ends, and leaves no file.
    Object stores and file systems that cannot lock a directory (some NFS) have none: there `captioner.store.lease`
    does the same with a marker file, and makes the next run after a crash wait some seconds.
    """
    if not location:
        yield _never_lost
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
        reason = "it is a file" if os.path.isfile(path) else error.strerror or error
        raise OutputError(f"{location} cannot be used as a directory: {reason}; give another OUT") from None
    try:
        if _lock(descriptor, location):
            yield _never_lost
        else:
            with leased(location) as lease:
                yield lease.check
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # nothing came of the run: leave no empty directory behind
                os.rmdir(path)


def is_held(location: str) -> bool:
    """Return whether a run holds OUT now.

    Where only a marker file tells, a run of another machine that died without removing it still counts.
    """
    if not location.startswith("hf://") and is_leased(location):
        return True
    if fcntl is None or is_uri(location):
        return False
    try:
        descriptor = os.open(local_path(location), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)  # which unlocks
    return False


def _lock(descriptor: int, location: str) -> bool:
    """Lock the directory; return whether its file system has such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{location}: another run is writing to it; wait until it ends, or give another OUT"
        ) from None
    except OSError:
        return False
    return True


def _never_lost() -> None:
    """Do nothing: a lock of the kernel is not lost while the process runs."""
