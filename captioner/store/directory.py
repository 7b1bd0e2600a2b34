"""A directory on a local disk or an object store whose files are written atomically."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from captioner.errors import OutputError
from captioner.files import Retry, open_filesystem, shown

_TEMPORARY = ".tmp"
ROW_GROUP_ROWS = 2_048
LEASE_FILE = "writer.json"  # the marker of a running writer: see `captioner.store.lease`

# Errors after which the same request fails again.
_FINAL_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG}
# pyarrow reports a store's answers as OSErrors without a number.
_REFUSED = re.compile(
    r"(?i:access.?denied|access_key_id|signature|expired.?token|permission|forbidden|unauthorized|credentials|"
    r"no.?such.?bucket|invalid.?bucket)"
)

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
    """Call the method of a Directory with its `retry`."""

    @functools.wraps(method)
    def wrapper(self: Directory, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return self.retry(lambda: method(self, *args, **kwargs))

    return wrapper


@dataclass(frozen=True)
class Directory:
    """The directory at `location`; names are relative to it, with forward slashes.

    On a local disk a file is written under a temporary name, flushed to the device and renamed; on an object store it
    is one PUT. A reader never sees half a file; a second writer of the same name replaces the whole file. Requests that
    fail with a transient error (a busy store, a broken connection) are repeated. Picklable: each process opens its own
    connection.
    """

    retry: ClassVar[Retry] = Retry((0.5, 2.0, 8.0), is_transient)

    location: str

    @cached_property
    def _opened(self) -> tuple[FileSystem, str]:
        return open_filesystem(self.location)

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location}

    @property
    def filesystem(self) -> FileSystem:
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return `name` as a path inside `filesystem`."""
        root = self._opened[1]
        return f"{root}/{name}" if name else root

    def shown(self, name: str) -> str:
        """Return the location of a file for messages: without the keys and options that a URI may hold."""
        return f"{shown(self.location)}/{name}"

    @_retried
    def exists(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return bool(self.filesystem.get_file_info(self.path(name)).type != FileType.NotFound)

    @_retried
    def list_names(self, folder: str) -> list[str]:
        """Return the names of the files directly in `folder`, sorted, without the temporary files of killed writers."""
        selector = FileSelector(self.path(folder), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.is_file and not i.base_name.endswith(_TEMPORARY))

    @_retried
    def list_folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in `folder` that hold a file, sorted.

        They are found by their files: on Google Cloud Storage pyarrow lists no folders.
        """
        root = self.path(folder)
        infos = self.filesystem.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        below = (info.path.removeprefix(root).strip("/").partition("/") for info in infos if info.is_file)
        return sorted({name for name, deeper, _ in below if deeper})

    def is_empty(self) -> bool:
        """Return whether the directory holds nothing but the marker of a running writer.

        Raises OutputError where `location` is a file or cannot be listed.
        """
        try:
            infos = self.filesystem.get_file_info(FileSelector(self.path(""), allow_not_found=True))
        except OSError as error:
            raise OutputError(f"{self.location} cannot be listed: {error}; give another OUT") from error
        return all(info.base_name == LEASE_FILE for info in infos)

    @_retried
    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError where there is none."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file atomically. Raises OutputError naming the file and the cause."""
        try:
            self._put(name, data)
        except OSError as error:
            raise OutputError(f"cannot write {self.shown(name)}: {error}; fix it and run again") from error

    @_retried
    def _put(self, name: str, data: bytes | pa.Buffer) -> None:
        if self.is_local:
            self._write_local(name, data)
            return
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(data)

    def _write_local(self, name: str, data: bytes | pa.Buffer) -> None:
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
        """Return the object in a JSON file. Raises OutputError where it holds something else."""
        value = json.loads(self.read_bytes(name))
        if not isinstance(value, dict):
            raise OutputError(f"{self.shown(name)} does not hold a JSON object")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write an object as an indented JSON file, atomically."""
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def open_parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file. Raises OutputError where it is damaged, FileNotFoundError where there is none."""
        try:
            return pq.ParquetFile(self.filesystem.open_input_file(self.path(name)))
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise OutputError(f"{self.shown(name)} is damaged: {error}") from error

    @_retried
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return a Parquet file as a table: these columns, or all. Raises as `open_parquet`."""
        with self.open_parquet(name) as file:
            return file.read(columns, use_threads=False)

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> pa.Buffer:
        """Write `table` as one Parquet file, atomically, and return the bytes written."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
        data = sink.getvalue()
        self.write_bytes(name, data)
        return data

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Buffer:
        """Write a stream of tables as one Parquet file, atomically, and return the bytes written.

        Row groups have about 2,000 rows.
        """
        sink, waiting, num_waiting = pa.BufferOutputStream(), list[pa.Table](), 0
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for table in tables:
                waiting.append(table)
                num_waiting += table.num_rows
                if num_waiting >= ROW_GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=num_waiting)
                    waiting, num_waiting = [], 0
            if waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=num_waiting)
        data = sink.getvalue()
        self.write_bytes(name, data)
        return data

    @_retried
    def delete(self, name: str) -> None:
        """Delete a file; a missing file is no error, whatever a store raises for it."""
        try:
            self.filesystem.delete_file(self.path(name))
        except OSError:
            if self.exists(name):
                raise

    def delete_folder(self, name: str) -> None:
        """Delete a folder with its content; a missing folder is no error."""
        try:
            self.filesystem.delete_dir(self.path(name))
        except OSError:
            if self.list_names(name) or self.list_folders(name):
                raise

    def sweep(self, folder: str) -> None:
        """Delete the temporary files that killed writers left in `folder`. No running writer may use it."""
        if not self.is_local:
            return
        infos = self.filesystem.get_file_info(FileSelector(self.path(folder), allow_not_found=True, recursive=True))
        for info in infos:
            if info.is_file and info.base_name.endswith(_TEMPORARY):
                os.unlink(info.path)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder to the device, so that a new name in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
