"""The files of an archive: their names, and opening them, alike on a local disk and in a store.

Names are bytes, because a disk's names need not be UTF-8; they become text only where people read them.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast
from urllib.parse import unquote_to_bytes

from pyarrow.fs import FileSelector, FileSystem, FileType

from captioner.errors import SourceError
from captioner.files import is_uri, local_path, open_filesystem

FETCH_FIRST = "captioner does not fetch http(s) URLs; fetch them with img2dataset first and caption its output"
BUFFER_BYTES = 4 << 20  # of one request to a store

# Known sidecars and documents, and what tar and Parquet archives are told by. Everything else may be an image.
DOCUMENT_SUFFIXES = (
    b".txt",
    b".json",
    b".jsonl",
    b".csv",
    b".parquet",
    b".xmp",
    b".xml",
    b".html",
    b".md",
    b".pdf",
)  # fmt: skip


def is_hidden(name: bytes) -> bool:
    """Whether a file or directory of that name is the system's own: dot files, thumbnails."""
    return name.startswith(b".") or name in (b"@eaDir", b"Thumbs.db")


def is_ignored(name: bytes) -> bool:
    """Whether a file of that base name is no image by its name alone."""
    return name.lower().endswith(DOCUMENT_SUFFIXES) or is_hidden(name)


def readable(name: bytes) -> str:
    """The name as text: UTF-8, with any other byte percent-escaped. Unicode is never normalised."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def unit_of_file(file: bytes) -> str:
    """A name as text that `file_of_unit` turns back: a percent sign of its own is escaped as well."""
    return readable(file.replace(b"%", b"%25"))


def file_of_unit(unit: str) -> bytes:
    return unquote_to_bytes(unit)


_WITHOUT_FOLDERS = ("gcs",)  # pyarrow lists files only there


@dataclass(slots=True)
class Directory:
    """What one directory holds, not what its sub-directories hold. Names are sorted by their bytes."""

    files: list[bytes] = field(default_factory=list)
    directories: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)  # pipes, sockets, devices: opening one may block for ever

    def sort(self) -> Directory:
        for names in (self.files, self.directories, self.others):
            names.sort()
        return self


@dataclass(frozen=True, slots=True)
class Root:
    """The directory that an archive's file names are relative to: an absolute local path or a URI."""

    location: str

    @staticmethod
    def at(location: str) -> Root:
        return Root(re.sub(r"/+(?=\?|$)", "", location) if is_uri(location) else local_path(location))

    def join(self, file: bytes) -> bytes:
        """The full path or URI of a file. A name that is absolute, or a URI, stays as it is."""
        if file.startswith(b"/") or is_uri(os.fsdecode(file)):
            return file
        return os.path.join(os.fsencode(self._base), file) if file else os.fsencode(self._base)

    @property
    def _base(self) -> str:
        """Without the options of the connection, which are no part of a file's name."""
        return self.location.partition("?")[0] if is_uri(self.location) else self.location

    def uri(self, file: bytes) -> str:
        """As people read it: a full path or URI, percent-escaped where it is not UTF-8, and without credentials."""
        return re.sub(r"^(\w+://)[^/@]*@", r"\1", readable(self.join(file)))

    def exists(self, file: bytes = b"") -> bool:
        return self.kind(file) != FileType.NotFound

    def kind(self, file: bytes = b"") -> FileType:
        """Whether there is a file, a directory or nothing. Raises SourceError where the store does not say."""
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

    def stamp(self, file: bytes) -> object:
        """What changes when the file does."""
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            filesystem, inside = self._inside(path)
            info = filesystem.get_file_info(inside)
            return info.mtime_ns, info.size
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size

    def has_anything(self) -> bool:
        """Whether the root is there and not empty: an unmounted disk leaves an empty directory behind."""
        if self.kind() != FileType.Directory:
            return False
        return next(self.scan_names(), None) is not None

    def scan_names(self, directory: bytes = b"") -> Iterator[tuple[bytes, FileType]]:
        """Names and kinds of what a directory holds, in no order.

        Raises SourceError where the directory cannot be listed.
        """
        path = self.join(directory)
        try:
            if is_uri(os.fsdecode(path)):
                yield from self._scan_store(path)
            else:
                with os.scandir(path) as entries:
                    for entry in entries:
                        yield entry.name, _kind(entry)
        except OSError as error:
            raise SourceError(f"{readable(path)}: cannot be listed: {error.strerror or error}") from None

    def scan(self, directory: bytes = b"") -> Directory:
        """What a directory holds, in order."""
        found = Directory()
        lists = {FileType.File: found.files, FileType.Directory: found.directories, FileType.Unknown: found.others}
        for name, kind in self.scan_names(directory):
            lists[kind].append(name)
        return found.sort()

    def identity(self, directory: bytes) -> object:
        """What tells a directory from any other, to notice that a symlink leads back to it."""
        path = self.join(directory)
        if is_uri(os.fsdecode(path)):
            return path
        try:
            status = os.stat(path)
        except OSError as error:
            raise SourceError(f"{readable(path)}: cannot be listed: {error.strerror}") from None
        return status.st_dev, status.st_ino

    def open(self, file: bytes) -> BinaryIO:
        """A file to read and seek in."""
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            filesystem, inside = self._inside(path)
            return io.BufferedReader(cast(Any, filesystem.open_input_file(inside)), BUFFER_BYTES)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IsADirectoryError(f"{readable(path)} is not a regular file")
        return os.fdopen(descriptor, "rb")

    def read(self, file: bytes, offset: int | None = None, size: int | None = None) -> bytes:
        """The bytes of a file, or `size` bytes from `offset`; fewer where the file ends before."""
        path = self.join(file)
        if is_uri(os.fsdecode(path)):
            return self._read_store(path, offset, size)
        with self.open(file) as stream:
            if offset:
                stream.seek(offset)
            return stream.read() if size is None else stream.read(size)

    def _inside(self, path: bytes) -> tuple[FileSystem, str]:
        """The filesystem of a URI and the path in it. What follows the host is taken letter by letter."""
        uri = os.fsdecode(path)
        if is_uri(self.location) and uri.startswith(self._base):
            filesystem, inside = open_filesystem(self.location)
            return filesystem, inside + uri.removeprefix(self._base)
        scheme, _, rest = uri.partition("://")
        if scheme.lower() in ("http", "https"):
            raise SourceError(f"{uri}: {FETCH_FIRST}")
        host, _, name = rest.partition("/")
        filesystem, inside = open_filesystem(f"{scheme}://{host}")
        return filesystem, f"{inside}/{name}"

    def _read_store(self, path: bytes, offset: int | None, size: int | None) -> bytes:
        filesystem, inside = self._inside(path)
        try:
            with filesystem.open_input_file(inside) as stream:
                return stream.read() if offset is None else stream.read_at(size, offset)
        except OSError:
            raise
        except Exception as error:  # clients behind fsspec have errors of their own
            raise OSError(f"{type(error).__name__}: {error}") from None

    def _scan_store(self, path: bytes) -> Iterator[tuple[bytes, FileType]]:
        filesystem, inside = self._inside(path)
        if filesystem.type_name in _WITHOUT_FOLDERS:
            yield from _scan_flat(filesystem, inside)
            return
        for info in filesystem.get_file_info(FileSelector(inside)):
            if info.base_name:
                yield info.base_name.encode(), info.type


def _scan_flat(filesystem: FileSystem, folder: str) -> Iterator[tuple[bytes, FileType]]:
    """What lies directly in a folder, told by all the files below it."""
    found = {}
    for info in filesystem.get_file_info(FileSelector(folder, recursive=True)):
        name, deeper, _ = info.path.removeprefix(folder).strip("/").partition("/")
        if name:
            found[name.encode()] = FileType.Directory if deeper else info.type
    yield from found.items()


def _kind(entry: os.DirEntry[bytes]) -> FileType:
    """Symlinks are followed; one that leads nowhere is a file, which will fail as not found."""
    try:
        if entry.is_dir():
            return FileType.Directory
        return FileType.File if entry.is_file() or not os.path.exists(entry.path) else FileType.Unknown
    except OSError:  # a symlink to itself
        return FileType.File
