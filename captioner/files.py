"""Open files on a local disk or on whatever pyarrow.fs or fsspec opens (s3://, gs://, hf://), and retry requests."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from captioner.errors import UsageError

T = TypeVar("T")


_FILE_URI = re.compile(r"file:(//(localhost)?)?/", re.IGNORECASE)  # also file:/path, as Java and Spark write it


def is_file_uri(location: str) -> bool:
    """Return whether it is a path of the local disk that is written as a URI."""
    return bool(_FILE_URI.match(location))


def is_uri(location: str) -> bool:
    """Return whether `location` is on a store other than the local disk. `file://` is the local disk."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and scheme.lower() != "file" and scheme.replace("+", "").isalnum()


def local_path(location: str) -> str:
    """Return the absolute path of a local location: `~` expanded, `file://` removed, symlinks kept."""
    if _FILE_URI.match(location):
        return os.path.abspath(unquote(_FILE_URI.sub("/", location, count=1), errors="surrogateescape"))
    return os.path.abspath(os.path.expanduser(location))


def absolute(location: str) -> str:
    """Return a path or URI that means the same in a process with another current folder."""
    return location if is_uri(location) else local_path(location)


def hub_reason(error: Exception) -> str:
    """Return the error of a call of the Hugging Face hub as one line without the token."""
    from huggingface_hub import get_token

    reason, token = " ".join(str(error).split()), get_token()
    return (reason.replace(token, "***") if token else reason)[:300] or type(error).__name__


def shown(location: str) -> str:
    """Return a location for records and messages: without the keys and options that a URI may hold."""
    address = location.partition("?")[0] if is_uri(location) else location
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", address)


def open_filesystem(location: str) -> tuple[FileSystem, str]:
    """Return the filesystem of a local path or URI, and the path inside it (absolute where local).

    Raises UsageError where nothing installed opens URIs of that scheme.
    """
    if not is_uri(location):
        return LocalFileSystem(), local_path(location)
    filesystem, path = _open_uri(location)
    return filesystem, path.rstrip("/")


@lru_cache(maxsize=256)
def _open_uri(uri: str) -> tuple[FileSystem, str]:
    """Open a URI. Cached: making a client takes milliseconds, or a request to the store."""
    try:
        filesystem, path = FileSystem.from_uri(
            quote(_with_single_puts(uri), safe=":/?&=@%+,;~!$'()*")
        )  # spaces and Unicode in keys
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _open_with_fsspec(uri)
    except OSError as error:  # hdfs:// without its libraries, for instance
        raise _cannot_open(uri, error) from None
    return filesystem, path


def _with_single_puts(uri: str) -> str:
    """Let a small file be one request to S3 instead of the three of a multipart upload."""
    if not uri.startswith("s3://") or "allow_delayed_open=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def _open_with_fsspec(uri: str) -> tuple[FileSystem, str]:
    import fsspec

    scheme = uri.partition("://")[0]
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:  # those it knows, those registered here
        raise UsageError(f"{shown(uri)}: unknown URI scheme {scheme}")
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # of any kind: each filesystem connects, or reads its options, in its own way
        raise _cannot_open(uri, error) from None
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _cannot_open(uri: str, error: Exception) -> UsageError:
    return UsageError(f"{shown(uri)} cannot be opened: {' '.join(str(error).split()) or type(error).__name__}")


def cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/captioner, else ~/.cache/captioner. It is not created here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner"


@dataclass(frozen=True)
class Retry:
    """Calls a function again while it raises an error that may not occur the next time.

    `waits`: seconds before the second, third ... try. `is_transient`: whether the same call may succeed later.
    """

    waits: tuple[float, ...]
    is_transient: Callable[[OSError], bool]
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, action: Callable[[], T]) -> T:
        """Return `action()`. Raises its OSError when it is not transient, or when no try is left."""
        for seconds in self.waits:
            try:
                return action()
            except OSError as error:
                if not self.is_transient(error):
                    raise
            self.sleep(seconds)
        return action()
