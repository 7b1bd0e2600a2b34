"""Open files on a local disk or on whatever pyarrow.fs or fsspec opens (s3://, gs://, hf://), and retry requests."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from captioner.console.text import valid_unicode
from captioner.errors import NoAnswerError, UsageError
from captioner.run.prefetch import in_background

T = TypeVar("T")

CONNECT_SECONDS = 30.0  # for the first answer of a store
_CHECK = "check the address, the network and the credentials of the store, then run again"
_unanswered: dict[str, Future[tuple[FileSystem, str]]] = {}  # by URI, so that nobody waits for it twice
# Of errors of clients: nobody answers, or there is nobody to ask for credentials.
_UNREACHABLE = re.compile(
    r"(?i:network_connection|curlcode|connection|resolve host|name or service|unreachable|timed? ?out|unavailable|"
    r"metadata|credential|authenticat|offline)"
)

_ONE_SLASH = re.compile(r"(?!file:)([a-z][a-z0-9+]+):/([^/].*)", re.IGNORECASE)  # s3:/bucket
_ALIKE = 0.75  # how alike two names are that may be meant for each other, from 0 to 1
_MAX_NAMES_COMPARED = 10_000  # of a folder
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


def inside(folder: str, name: str) -> str:
    """Return the location of a file in a folder; the options of a URI stay at its end."""
    path, mark, options = folder.partition("?") if is_uri(folder) else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def shown(location: str) -> str:
    """Return a location for records and messages: without the keys and options that a URI may hold."""
    address = location.partition("?")[0] if is_uri(location) else location
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", address)


def did_you_mean(location: str) -> str:
    """Return "; did you mean PATH?" for a path that is not there, or "" where nothing near it is.

    That is a path on this machine that is written almost alike, or the URI of a path with one slash too few.
    """
    if with_one_slash := _ONE_SLASH.fullmatch(location):
        return f"; did you mean {with_one_slash[1]}://{with_one_slash[2]}?"
    if is_uri(location):
        return ""
    first, *names = Path(location).expanduser().parts or (".",)
    path = Path(first) if Path(first).exists() else Path(_near(Path(), first))
    for name in names:
        path /= name if (path / name).exists() else _near(path, name)
    return f"; did you mean {path}?" if path.exists() and path != Path(location) else ""


def _near(folder: Path, name: str) -> str:
    """Return the name in `folder` that is most like `name`, which it lacks; `name` itself where none is."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, _MAX_NAMES_COMPARED)]
    except OSError:
        return name
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)), name)


def check_remains(location: str) -> None:
    """Raise UsageError where what is written would be lost with the process."""
    if location.lower().startswith("memory://"):
        raise UsageError(
            f"{shown(location)}: memory:// is lost when the command ends; give an OUT on a disk, s3:// or gs://"
        )


def open_filesystem(location: str) -> tuple[FileSystem, str]:
    """Return the filesystem of a local path or URI, and the path inside it (absolute where local).

    Raises UsageError where a local path is not UTF-8, where nothing installed opens URIs of that scheme, and where the
    store cannot be reached or does not answer within CONNECT_SECONDS.
    """
    if not is_uri(location):
        path = local_path(location)
        if path != valid_unicode(path):  # pyarrow takes none of those
            raise UsageError(f"{path!a}: its name is not UTF-8; rename it, or give another path")
        return LocalFileSystem(), path
    filesystem, path = _open_uri(location)
    return filesystem, path.rstrip("/")


@lru_cache(maxsize=256)
def _open_uri(uri: str) -> tuple[FileSystem, str]:
    """Open a URI. Cached: making a client takes milliseconds, or a request to the store."""
    asked_before = _unanswered.pop(uri, None)
    connection = asked_before or in_background(partial(_connect, uri))
    wait([connection], 0 if asked_before else CONNECT_SECONDS)
    if not connection.done():
        _unanswered[uri] = connection
        raise NoAnswerError(f"{shown(uri)} did not answer within {CONNECT_SECONDS:g} s; {_CHECK}")
    return connection.result()


def _connect(uri: str) -> tuple[FileSystem, str]:
    """Open a URI, and ask the store once. Raises UsageError where that shows that it cannot be reached."""
    try:
        filesystem, path = FileSystem.from_uri(
            quote(_with_options(uri), safe=":/?&=@%+,;~!$'()*")
        )  # spaces and Unicode in keys
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        filesystem, path = _open_with_fsspec(uri)
    except (OSError, pa.ArrowException) as error:  # hdfs:// without its libraries, for instance
        raise _cannot_open(uri, error) from None
    try:
        filesystem.get_file_info(path.rstrip("/"))
    except Exception as error:  # clients behind fsspec raise their own exceptions
        if _UNREACHABLE.search(f"{type(error).__name__} {error}"):
            raise _cannot_open(uri, error, f"; {_CHECK}") from None
    return filesystem, path


def _with_options(uri: str) -> str:
    """Add options of pyarrow that the URI does not set.

    A small file is one request to S3, not the three of a multipart upload. Google Cloud Storage would repeat a request
    for 15 minutes; those who ask have their own repetitions (`Retry`).
    """
    scheme = uri.partition("://")[0].lower()
    option, value = {
        "s3": ("allow_delayed_open", "true"),
        "gs": ("retry_limit_seconds", f"{CONNECT_SECONDS:g}"),
        "gcs": ("retry_limit_seconds", f"{CONNECT_SECONDS:g}"),
    }.get(scheme, ("", ""))
    if not option or f"{option}=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}{option}={value}"


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


def _cannot_open(uri: str, error: Exception, what_to_do: str = "") -> UsageError:
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    return UsageError(f"{shown(uri)} cannot be opened: {reason}{what_to_do}")


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
