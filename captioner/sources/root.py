"""The files of a source, on a local disk or in a store: listing, opening and reading them.

Names are bytes, because names on a disk need not be UTF-8; they become text only where people read them.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, TypeVar, cast
from urllib.parse import unquote_to_bytes

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from captioner.errors import SourceError
from captioner.files import Retry, is_file_uri, is_uri, local_path, open_filesystem

FETCH_FIRST = "captioner does not fetch http(s) URLs; fetch them with img2dataset first and caption its output"
FETCH_LFS = "it is a pointer of Git LFS, without the content; fetch that with `git lfs pull`"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TABLE_FILE = b"table.json"  # in the OUT of a run
HEAD_BYTES = 4096  # in which the formats of images have their signatures
UNKNOWN = (-1, -1)  # size and time of change of a file that cannot be asked for
BUFFER_BYTES = 4 << 20  # of one request to a store

# Sidecars, documents, tables and what systems and tools leave beside images, which are never images. Every other file
# may be one.
DOCUMENT_SUFFIXES = tuple(
    b"." + suffix
    for suffix in b"txt caption captions json jsonl csv tsv parquet xmp xml html htm md pdf yaml yml toml log".split()
    + b"npz npy pt pth pkl safetensors ini db lnk url aae ipynb py md5 sha1 sha256".split()
)


def is_captions_table(files: Collection[bytes], directories: Collection[bytes]) -> bool:
    """Return whether a directory with this content is the OUT of a run, whose files are no images of a source."""
    return TABLE_FILE in files and b"plan" in directories


def is_hidden(name: bytes) -> bool:
    """Return whether the system made a file or directory of that name: dot files, thumbnails."""
    return name.startswith(b".") or name in (b"@eaDir", b"Thumbs.db", b"Icon\r")


def is_ignored(name: bytes) -> bool:
    """Return whether a file of that base name cannot be an image."""
    return name.lower().endswith(DOCUMENT_SUFFIXES) or is_hidden(name)


def is_excluded(name: bytes, globs: Sequence[str]) -> bool:
    """Return whether --exclude leaves out a file, before it is opened; of a name that ends in "/" all below it."""
    text = readable(name)
    needed = "*" if text.endswith("/") else ""
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in globs if pattern.endswith(needed))


def readable(name: bytes) -> str:
    """Return a name as text: UTF-8, with any other byte percent-escaped. Unicode is never normalised."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def unit_of_file(file: bytes) -> str:
    """Return a name as text that `file_of_unit` decodes: percent signs in the name are escaped as well."""
    return readable(file.replace(b"%", b"%25"))


def file_of_unit(unit: str) -> bytes:
    """Return the name that `unit_of_file` encoded."""
    return unquote_to_bytes(unit)


def file_named_in(folder: bytes, path: str) -> bytes:
    """Return the file that a table in `folder` names: by a URI, an absolute path, or a path relative to the folder."""
    if is_file_uri(path):
        return os.fsencode(local_path(path))
    return os.fsencode(path) if is_uri(path) else os.path.join(folder, os.fsencode(path))


# Errors of a name or path: the same read fails again.
_NAME_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NAME_NUMBERS = {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
# Messages of stores and of Parquet: pyarrow reports them as OSErrors without a number.
_REFUSED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|ExpiredToken|"
    r"EXPIRED_TOKEN|TokenExpired|PERMISSION_DENIED|UNAUTHENTICATED|Unauthorized|Forbidden|HTTP status 40[13]|"
    r"(?i:credentials)"
)
_DAMAGED = re.compile(r"(?i:corrupt|deserialize thrift|unexpected end of stream|page was smaller|decompress)")


def error_code_of(error: OSError) -> str:
    """Return the error code of a read that failed; "timeout" stands for every transient error."""
    message = str(error) if error.errno is None else ""
    if isinstance(error, PermissionError) or _REFUSED.search(message):
        return "permission"
    if error.errno == errno.EBADMSG or _DAMAGED.search(message):
        return "decode_error"
    return "not_found" if isinstance(error, _NAME_ERRORS) or error.errno in _NAME_NUMBERS else "timeout"


def is_transient(error: OSError) -> bool:
    """Return whether the same read may succeed later."""
    return error_code_of(error) == "timeout"


class RefusedFileError(Exception):
    """A file that is not read, for a reason known before: `code` is one of ERROR_CODES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


# Raises RefusedFileError for a file of a size whose first bytes the function returns.
Admit = Callable[[int, Callable[[], bytes]], None]
T = TypeVar("T")
_admit: ContextVar[Admit | None] = ContextVar("admit", default=None)


@contextmanager
def assigned(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Let a context variable have a value within the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def admitting(admit: Admit) -> AbstractContextManager[None]:
    """Let `admit` decide, before a whole file is read by this thread, whether it is."""
    return assigned(_admit, admit)


@dataclass(slots=True)
class Directory:
    """The content of one directory, without that of its sub-directories."""

    files: list[bytes] = field(default_factory=list)
    directories: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)  # pipes, sockets, devices: opening one may block for ever

    def sort(self) -> Directory:
        """Sort the names by their bytes."""
        for names in (self.files, self.directories, self.others):
            names.sort()
        return self


@dataclass(frozen=True, slots=True)
class Root:
    """The directory to which the file names of a source are relative: an absolute local path or a URI.

    Class attributes: `retry`, for single reads; `without_folders`, filesystems of which pyarrow lists only files.
    """

    retry: ClassVar[Retry] = Retry((0.2, 0.8, 3.2), is_transient)
    without_folders: ClassVar[tuple[str, ...]] = ("gcs",)

    location: str

    @staticmethod
    def at(location: str) -> Root:
        """Return the root of a path or URI as a user wrote it."""
        return Root(re.sub(r"/+(?=\?|$)", "", location) if is_uri(location) else local_path(location))

    def join(self, file: bytes) -> bytes:
        """Return the full path or URI of a file. A name that is absolute, or a URI, stays as it is."""
        if file.startswith(b"/") or (b"://" in file and is_uri(os.fsdecode(file))):
            return file
        return os.path.join(os.fsencode(self._base), file) if file else os.fsencode(self._base)

    @property
    def _base(self) -> str:
        """The location without the options of the connection, which are not part of a file's name."""
        return self.location.partition("?")[0] if is_uri(self.location) else self.location

    @property
    def _options(self) -> str:
        """The options of the connection, from their question mark on."""
        return self.location[len(self._base) :]

    def folder_and_name(self) -> tuple[Root, bytes]:
        """Return the root of the folder that holds this file, with the options of the connection, and its name."""
        folder, _, name = os.fsencode(self._base).rpartition(b"/")
        return Root(os.fsdecode(folder or b"/") + self._options), name

    def uri(self, file: bytes) -> str:
        """Return the full path or URI for people: percent-escaped where it is not UTF-8, without credentials."""
        return re.sub(r"^(\w+://)[^/@]*@", r"\1", readable(self.join(file)))

    def exists(self, file: bytes = b"") -> bool:
        """Return whether there is such a file or directory."""
        return bool(self.kind(file) != FileType.NotFound)

    def kind(self, file: bytes = b"") -> FileType:
        """Return whether it is a file, a directory or nothing. Raises SourceError where the store does not answer."""
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            filesystem, inside = self._inside(path)
            try:
                return filesystem.get_file_info(inside).type
            except OSError as error:
                raise SourceError(f"{readable(path)}: cannot be reached: {error}") from None
        if os.path.isdir(path):
            return FileType.Directory
        return FileType.File if os.path.lexists(path) else FileType.NotFound

    def stamp(self, file: bytes) -> str | None:
        """Return the size and time of change of a file, as text; None where it cannot be asked for."""
        path = self.join(file)
        try:
            if is_uri(os.fsdecode(path)):
                filesystem, inside = self._inside(path)
                info = filesystem.get_file_info(inside)
                return None if info.type == FileType.NotFound else _stamp(info)
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        return f"{status.st_size} {status.st_mtime_ns}"

    def is_in_store(self, file: bytes) -> bool:
        """Return whether the file is not on a local disk."""
        if b"://" in file and is_uri(os.fsdecode(file)):
            return True
        return not file.startswith(b"/") and is_uri(self.location)

    def sizes_and_times(self, files: Sequence[bytes]) -> list[tuple[int, int]]:
        """Return size in bytes and time of change in ns of files of a local disk; UNKNOWN of what cannot be asked."""
        base = os.path.join(os.fsencode(self._base), b"")
        results = []
        for file in files:
            try:
                status = os.stat(file if file.startswith(b"/") else base + file)
                results.append((status.st_size, status.st_mtime_ns))
            except (OSError, ValueError):
                results.append(UNKNOWN)
        return results

    def sizes_and_times_in(self, folder: bytes) -> dict[bytes, tuple[int, int]]:
        """Return the same of each file in a folder of a store, by name; {} where it cannot be listed."""
        filesystem, inside = self._inside(self.join(folder))
        try:
            infos = filesystem.get_file_info(FileSelector(inside))
        except OSError:
            return {}
        return {
            info.base_name.encode(): (UNKNOWN[0] if info.size is None else info.size, info.mtime_ns or UNKNOWN[1])
            for info in infos
            if info.type == FileType.File
        }

    def has_anything(self) -> bool:
        """Return whether the root exists and is not empty: an unmounted disk leaves an empty directory behind."""
        if self.kind() != FileType.Directory:
            return False
        return next(self.scan_names(), None) is not None

    def scan_names(self, directory: bytes = b"") -> Iterator[tuple[bytes, FileType]]:
        """Yield the name and kind of each entry of a directory, in no order.

        Raises SourceError where the directory cannot be listed.
        """
        path = self.join(directory)
        if b"\0" in path:
            raise UnlistableError(f"{readable(path)!a}: cannot be listed: no name holds a null byte")
        try:
            if is_uri(os.fsdecode(path)):
                yield from self._scan_store(path)
            else:
                with os.scandir(path) as entries:
                    for entry in entries:
                        yield entry.name, _kind(entry)
        except OSError as error:
            raise _unlistable(path, error) from None

    def scan(self, directory: bytes = b"") -> Directory:
        """Return the content of a directory, sorted."""
        content = Directory()
        lists = {
            FileType.File: content.files,
            FileType.Directory: content.directories,
            FileType.Unknown: content.others,
        }
        for name, kind in self.scan_names(directory):
            lists[kind].append(name)
        return content.sort()

    def identity(self, directory: bytes) -> object:
        """Return a value that identifies a directory, to detect that a symlink leads back to it."""
        path = self.join(directory)
        if is_uri(os.fsdecode(path)):
            return path
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unlistable(path, error) from None
        return status.st_dev, status.st_ino

    def open(self, file: bytes) -> BinaryIO:
        """Open a file for reading and seeking."""
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            filesystem, inside = self._inside(path)
            return io.BufferedReader(cast(Any, filesystem.open_input_file(inside)), BUFFER_BYTES)
        if b"\0" in path:
            raise FileNotFoundError(errno.ENOENT, "no file name holds a null byte")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IsADirectoryError(f"{readable(path)} is not a regular file")
        return os.fdopen(descriptor, "rb")

    def read(self, file: bytes, offset: int | None = None, size: int | None = None) -> bytes:
        """Return the bytes of a file, or `size` bytes from `offset`; fewer where the file ends before.

        A whole file is read only where the `admitting` of this thread lets it be read.
        """
        admit = _admit.get() if size is None else None
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            return self._read_store(path, offset, size, admit)
        with self.open(file) as stream:
            if admit:
                admit(os.fstat(stream.fileno()).st_size, lambda: stream.read(HEAD_BYTES))
                stream.seek(0)
            if offset:
                stream.seek(offset)
            return stream.read() if size is None else stream.read(size)

    def _inside(self, path: bytes) -> tuple[FileSystem, str]:
        """Return the filesystem of a URI and the path in it. The path is taken literally, without unquoting."""
        uri = os.fsdecode(path)
        if is_uri(self.location) and uri.startswith(self._base):
            filesystem, inside = open_filesystem(self.location)
            return filesystem, inside + uri.removeprefix(self._base)
        scheme, _, rest = uri.partition("://")
        if scheme.lower() in ("http", "https"):
            raise SourceError(f"{uri}: {FETCH_FIRST}")
        bucket, _, name = rest.partition("/")
        filesystem, inside = open_filesystem(self._bucket(scheme, bucket))
        return filesystem, f"{inside}/{name}"

    def _bucket(self, scheme: str, bucket: str) -> str:
        """Return the URI of a bucket, with the keys and options of the root where they are those of that bucket.

        A server of one's own (endpoint_override) has them for each of its buckets.
        """
        own_scheme, _, rest = self._base.partition("://")
        keys, at, own = rest.partition("/")[0].rpartition("@")
        is_on_server = bucket == own or "endpoint_override=" in self._options
        if is_uri(self.location) and scheme == own_scheme and is_on_server and "@" not in bucket:
            return f"{scheme}://{keys}{at}{bucket}{self._options}"
        return f"{scheme}://{bucket}"

    def _read_store(self, path: bytes, offset: int | None, size: int | None, admit: Admit | None) -> bytes:
        filesystem, inside = self._inside(path)
        try:
            with filesystem.open_input_file(inside) as stream:
                if admit:
                    admit(stream.size(), lambda: bytes(stream.read_at(HEAD_BYTES, 0)))
                return bytes(stream.read() if offset is None else stream.read_at(size, offset))
        except (OSError, RefusedFileError):
            raise
        except Exception as error:  # clients behind fsspec raise their own exceptions
            raise OSError(f"{type(error).__name__}: {error}") from None

    def _scan_store(self, path: bytes) -> Iterator[tuple[bytes, FileType]]:
        filesystem, inside = self._inside(path)
        if filesystem.type_name in self.without_folders:
            yield from _scan_flat(filesystem, inside)
            return
        for info in filesystem.get_file_info(FileSelector(inside)):
            if info.base_name:
                yield info.base_name.encode(), info.type


class UnlistableError(SourceError):
    """A directory that cannot be listed, now and later: refused, gone, or of too long a path."""


def _unlistable(path: bytes, error: OSError) -> SourceError:
    kind = SourceError if is_transient(error) else UnlistableError
    return kind(f"{readable(path)}: cannot be listed: {error.strerror or error}")


def _stamp(info: FileInfo) -> str:
    return f"{info.size} {info.mtime_ns or '-'}"


def _scan_flat(filesystem: FileSystem, folder: str) -> Iterator[tuple[bytes, FileType]]:
    """Yield the entries of a folder, derived from all the files below it."""
    kinds: dict[bytes, FileType] = {}
    for info in filesystem.get_file_info(FileSelector(folder, recursive=True)):
        name, deeper, _ = info.path.removeprefix(folder).strip("/").partition("/")
        if name:
            kinds[name.encode()] = FileType.Directory if deeper else info.type
    yield from kinds.items()


def _kind(entry: os.DirEntry[bytes]) -> FileType:
    """Return the kind of an entry. Symlinks are followed; a broken one counts as a file, which fails as not found."""
    try:
        if entry.is_dir():
            return FileType.Directory
        return FileType.File if entry.is_file() or not os.path.exists(entry.path) else FileType.Unknown
    except OSError:  # a symlink to itself
        return FileType.File
