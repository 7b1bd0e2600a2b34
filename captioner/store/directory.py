"""A directory on a local disk or an object store whose files are written atomically."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType

from captioner.errors import DamagedFileError, OutputError
from captioner.files import Retry, absolute, is_uri, open_filesystem, shown
from captioner.store.checksum import (
    ARROW_SUFFIX,
    PARSE_ERRORS,
    WholeFile,
    decoded,
    from_file,
    to_arrow,
    to_parquet,
    whole_file,
    with_checksum,
    without_checksum,
)

_TEMPORARY = ".tmp"
ROW_GROUP_ROWS = 16_384
LEASE_FILE = "writer.json"  # the marker of a running writer: see `captioner.store.lease`
RECHECK_FILE = "plan/recheck.json"  # a file was found damaged: the next start reads all of them

# Errors after which the same request fails again.
_FINAL_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG}
# pyarrow reports a store's answers as OSErrors without a number.
_REFUSED = re.compile(
    r"(?i:access.?denied|access_key_id|signature|expired.?token|permission|forbidden|unauthorized|credentials|"
    r"no.?such.?bucket|invalid.?bucket)"
)

# What to do about a damaged or missing file, by its folder.
_WAYS_OUT = {
    "plan": "run the same `captioner caption` command again, which makes it anew",
    "chunks": "run the same `captioner caption` command again, which captions its images anew",
    "captions": "run the same `captioner caption` command again, which captions its images anew",
    "alt_text": "run `captioner alt-text` again",
    "checks": "run `captioner check` again",
    "report": "run `captioner report` again",
}
_NO_WAY_OUT = "restore it from a backup, or give another OUT"

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def is_transient(error: OSError) -> bool:
    """Return whether the same request may succeed later: the store was busy, or the connection broke."""
    if isinstance(error, _FINAL_ERRORS) or error.errno in _FINAL_NUMBERS:
        return False
    return error.errno is not None or not _REFUSED.search(str(error))


def _retried(
    method: Callable[Concatenate[Directory, P], ResultT],
) -> Callable[Concatenate[Directory, P], ResultT]:
    """Call the method of a Directory with its `retry`; its first argument is the name of a file or folder.

    The method then raises DamagedFileError for a missing file, and OutputError for any other error of the store.
    """

    @functools.wraps(method)
    def wrapper(self: Directory, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        try:
            return self.retry(lambda: method(self, *args, **kwargs))
        except FileNotFoundError as error:
            raise self.damage(str(args[0]), "is missing") from error
        except OSError as error:
            raise OutputError(f"{self.shown(str(args[0]))} cannot be read: {error}; fix it, then run again") from error

    return wrapper


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes of a file, and when it was last changed, in ns; None where the store does not say."""

    num_bytes: int
    changed_at: int | None

    def is_unchanged(self, num_bytes: int | None, since: FileStat | None) -> bool:
        """Return whether the file has a size, and was not changed after another file, which was written after it."""
        if since is None or since.changed_at is None or self.changed_at is None:
            return False
        return self.num_bytes == num_bytes and self.changed_at <= since.changed_at


@dataclass(frozen=True)
class Directory:
    """The directory at `location`, or a folder in it; names are relative to it, with forward slashes.

    On a local disk a file is written under a temporary name, flushed to the device and renamed; on an object store it
    is one PUT. A reader never sees half a file; a second writer of the same name replaces the whole file. Requests that
    fail with a transient error (a busy store, a broken connection) are repeated. Picklable: each process opens its own
    connection, and a relative path is that of the process that made it.
    """

    retry: ClassVar[Retry] = Retry((0.5, 2.0, 8.0), is_transient)

    location: str
    folder: str = ""

    @cached_property
    def _opened(self) -> tuple[FileSystem, str]:
        filesystem, root = open_filesystem(self.location)
        return filesystem, f"{root}/{self.folder}" if self.folder else root

    def __getstate__(self) -> dict[str, Any]:
        return {"location": absolute(self.location), "folder": self.folder}

    @property
    def filesystem(self) -> FileSystem:
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        return not is_uri(self.location)

    def path(self, name: str) -> str:
        """Return `name` as a path inside `filesystem`."""
        root = self._opened[1]
        return f"{root}/{name}" if name else root

    def shown(self, name: str) -> str:
        """Return the location of a file for messages: without the keys and options that a URI may hold."""
        return "/".join(filter(None, (shown(self.location), self.folder, name)))

    def damage(self, name: str, what: str) -> DamagedFileError:
        """Return the error for a damaged or missing file. `what`: "is missing", "is damaged: ...".

        A start compares only sizes and times, in which damage may not show: it is noted for the next one.
        """
        folder = name.partition("/")[0]
        if folder in ("plan", "captions") and what.startswith("is damaged"):
            with suppress(OutputError):  # of somebody else, who may not write here
                self.write_json(RECHECK_FILE, {"damaged": name})
        return DamagedFileError(f"{self.shown(name)} {what}; {_WAYS_OUT.get(folder, _NO_WAY_OUT)}")

    def newer(self, name: str, setting: str) -> OutputError:
        """Return the error for a file with a setting that this version does not know."""
        return OutputError(
            f"{self.shown(name)} was written by a newer captioner (setting {setting!r}); use that version, or give "
            "another OUT"
        )

    @_retried
    def exists(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return bool(self.filesystem.get_file_info(self.path(name)).type != FileType.NotFound)

    def list_names(self, folder: str) -> list[str]:
        """Return the names of the files directly in `folder`, sorted, without the temporary files of killed writers."""
        return sorted(self.list_files(folder))

    @_retried
    def list_files(self, folder: str) -> dict[str, FileStat]:
        """Return size and time of the files directly in `folder` by name, without temporary files."""
        infos = self.filesystem.get_file_info(FileSelector(self.path(folder), allow_not_found=True))
        return {
            info.base_name: FileStat(info.size or 0, info.mtime_ns)
            for info in infos
            if info.is_file and not info.base_name.endswith(_TEMPORARY)
        }

    @_retried
    def list_folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in `folder` that hold a file, sorted.

        They are found by their files: on Google Cloud Storage pyarrow lists no folders.
        """
        root = self.path(folder)
        infos = self.filesystem.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        below = (info.path.removeprefix(root).strip("/").partition("/") for info in infos if info.is_file)
        return sorted({name for name, deeper, _ in below if deeper})

    def is_empty(self, besides: Sequence[str] = ()) -> bool:
        """Return whether the directory holds nothing but the marker of a running writer, and files of these names.

        Raises OutputError where `location` is a file or cannot be listed.
        """
        try:
            infos = self.filesystem.get_file_info(FileSelector(self.path(""), allow_not_found=True))
        except OSError as error:
            raise OutputError(f"{self.location} cannot be listed: {error}; give another OUT") from error
        return all(info.base_name in (LEASE_FILE, *besides) for info in infos)

    @_retried
    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file. Raises DamagedFileError where there is none."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes | bytearray | pa.Buffer) -> None:
        """Write a file atomically. Raises OutputError naming the file and the cause."""
        try:
            self.retry(lambda: self._put(name, data))
        except OSError as error:
            raise OutputError(f"cannot write {self.shown(name)}: {error}; fix it, then run again") from error

    def _put(self, name: str, data: bytes | bytearray | pa.Buffer) -> None:
        if self.is_local:
            self._write_local(name, data)
            return
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(data)

    def _write_local(self, name: str, data: bytes | bytearray | pa.Buffer) -> None:
        final = self.path(name)
        folder = os.path.dirname(final)
        os.makedirs(folder, exist_ok=True)
        temporary = f"{final}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, final)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        sync_folder(folder)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file, without its checksum. Raises DamagedFileError where it holds none."""
        try:
            value = json.loads(self.read_bytes(name))
            if not isinstance(value, dict):
                raise ValueError("it does not hold a JSON object")
            return without_checksum(value)
        except (ValueError, RecursionError) as error:
            raise self.damage(name, f"is damaged: {error}") from error

    def read_record(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file that is written anew in time; {} where it is damaged or missing."""
        try:
            return self.read_json(name)
        except DamagedFileError:
            return {}

    def write_json(self, name: str, value: dict[str, Any], checksum: bool = False) -> None:
        """Write an object as an indented JSON file, atomically."""
        value = with_checksum(value) if checksum else value
        text = json.dumps(value, indent=2, ensure_ascii=False)
        # Paths that are not UTF-8 hold halves of surrogate pairs: they are escaped, and reading restores them.
        self.write_bytes(name, text.encode(errors="backslashreplace") + b"\n")

    @contextmanager
    def open_parquet(self, name: str, columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
        """Open a Parquet file for reading some of its row groups, whose pages are checked.

        Raises DamagedFileError where there is no such file, what is read of it is damaged, or it lacks one of
        `columns`: their names have no checksum.
        """
        try:
            with pq.ParquetFile(self._open(name), page_checksum_verification=True) as file:
                if missing := sorted(set(columns) - set(file.schema_arrow.names)):
                    raise ValueError(f"it has no column {missing[0]}")
                yield file
        except PARSE_ERRORS as error:
            raise self.damage(name, f"is damaged: {error}") from error

    @_retried
    def _open(self, name: str) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path(name))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return a file, Arrow IPC or Parquet by its name, as a table: these columns, or all.

        All its bytes are read and compared with its checksum. Raises DamagedFileError.
        """
        try:
            return from_file(name, self.read_bytes(name), columns)
        except ValueError as error:
            raise self.damage(name, f"is damaged: {error}") from error

    def read_columns(self, name: str, columns: list[str]) -> pa.Table:
        """Return some columns of a Parquet file; no other bytes are read. Raises DamagedFileError."""
        with self.open_parquet(name, columns) as file:
            return file.read(columns, use_threads=False)

    def read_checked(self, name: str) -> WholeFile:
        """Return a table's file. Raises DamagedFileError where its bytes are not those that were written."""
        try:
            return whole_file(name, self.read_bytes(name))
        except ValueError as error:
            raise self.damage(name, f"is damaged: {error}") from error

    def decoded(self, name: str, file: WholeFile, columns: list[str] | None = None) -> pa.Table:
        """Return what `read_checked` returned of a file as a table: these columns, or all.

        Raises DamagedFileError where it is whole but another kind of file, without these columns.
        """
        try:
            return decoded(name, file.data, columns)
        except ValueError as error:
            raise self.damage(name, f"is damaged: {error}") from error

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> WholeFile:
        """Write `table` as one file, Arrow IPC or Parquet by its name, atomically, and return what was written."""
        file = to_arrow(table) if name.endswith(ARROW_SUFFIX) else to_parquet(table.schema, [table], row_group_size)
        self.write_bytes(name, file.data)
        return file

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> WholeFile:
        """Write a stream of tables as one Parquet file, atomically, and return what was written.

        Row groups have at least ROW_GROUP_ROWS rows.
        """
        file = to_parquet(schema, _row_groups(tables))
        self.write_bytes(name, file.data)
        return file

    @_retried
    def delete(self, name: str) -> None:
        """Delete a file; a missing file is not an error, whatever a store raises for it."""
        try:
            self.filesystem.delete_file(self.path(name))
        except OSError:
            if self.exists(name):
                raise

    def delete_folder(self, name: str) -> None:
        """Delete a folder with its content; a missing folder is not an error."""
        try:
            self.filesystem.delete_dir(self.path(name))
        except OSError as error:
            if self.list_names(name) or self.list_folders(name):
                raise OutputError(f"{self.shown(name)} cannot be deleted: {error}; fix it, then run again") from error

    def sweep(self, folder: str) -> None:
        """Delete the temporary files that killed writers left in `folder`. No running writer may use it."""
        if not self.is_local:
            return
        for name in self._temporary_files(folder):
            try:
                os.unlink(name)
            except OSError as error:
                raise OutputError(f"{name} cannot be deleted: {error.strerror}; fix it, then run again") from error

    @_retried
    def _temporary_files(self, folder: str) -> list[str]:
        infos = self.filesystem.get_file_info(FileSelector(self.path(folder), allow_not_found=True, recursive=True))
        return [info.path for info in infos if info.is_file and info.base_name.endswith(_TEMPORARY)]


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join a stream of tables into tables of at least ROW_GROUP_ROWS rows."""
    waiting, num_waiting = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        num_waiting += table.num_rows
        if num_waiting >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting, num_waiting = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder to the device, so that a new name in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
