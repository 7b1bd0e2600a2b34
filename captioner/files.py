"""Where files lie: one way to open a local path and whatever pyarrow.fs or fsspec opens (s3://, gs://, hf://)."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from captioner.errors import UsageError


def is_uri(location: str) -> bool:
    """Whether `location` names a store other than the local disk. `file://` is the local disk."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and scheme != "file" and scheme.replace("+", "").isalnum()


def local_path(location: str) -> str:
    """The absolute path of a local location: `~` expanded, `file://` undone, symlinks kept."""
    if location.startswith("file://"):
        return os.path.abspath(unquote(location.removeprefix("file://"), errors="surrogateescape"))
    return os.path.abspath(os.path.expanduser(location))


def shown(location: str) -> str:
    """A location for records and messages: without the keys and options that a URI may hold."""
    place = location.partition("?")[0] if is_uri(location) else location
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", place)


def open_filesystem(location: str) -> tuple[FileSystem, str]:
    """The filesystem of a local path or URI, and the path inside it (absolute where local).

    Raises UsageError where nothing installed opens URIs of that scheme.
    """
    if not is_uri(location):
        return LocalFileSystem(), local_path(location)
    filesystem, path = _open_uri(location)
    return filesystem, path.rstrip("/")


@lru_cache(maxsize=256)
def _open_uri(uri: str) -> tuple[FileSystem, str]:
    """Cached: making a client costs milliseconds, or a question to the store."""
    try:
        return FileSystem.from_uri(quote(uri, safe=":/?&=@%+,;~!$'()*"))  # spaces and Unicode in keys
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _open_with_fsspec(uri)


def _open_with_fsspec(uri: str) -> tuple[FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{uri}: no filesystem opens it: {' '.join(str(error).split())}") from None
    return PyFileSystem(FSSpecHandler(filesystem)), path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/captioner, else ~/.cache/captioner. Not created here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captioner"
