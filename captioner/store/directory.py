"""A directory on a local disk or an object store in which a file is there whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from captioner.errors import OutputError
from captioner.files import open_filesystem, shown
from captioner.store.retry import retried

_TEMPORARY = ".tmp"
ROW_GROUP_ROWS = 2_048
LEASE_FILE = "writer.json"  # of a run at work: see `captioner.store.lease`


@dataclass(frozen=True)
class Directory:
    """The directory at `location`; names are relative to it, with forward slashes. Picklable: each process opens its
    own connection.

    On a local disk a file is written beside its place, flushed to the device and renamed; on an object store it is one
    PUT. A reader never sees half a file, a second writer of the same name replaces it whole. What may pass (a busy
    store, a broken connection) is tried again.
    """

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
        """`name` as a path inside `filesystem`."""
        root = self._opened[1]
        return f"{root}/{name}" if name else root

    def shown(self, name: str) -> str:
        """The place of a file for a person to read: without the keys and options that a URI may hold."""
        return f"{shown(self.location)}/{name}"

    @retried
    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(self.path(name)).type != FileType.NotFound)

    @retried
    def list_names(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted; temporary files of killed writers are not among them."""
        selector = FileSelector(self.path(folder), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.is_file and not i.base_name.endswith(_TEMPORARY))

    @retried
    def list_folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted: of those that hold a file, since pyarrow does not list
        others, nor any as such, on Google Cloud Storage."""
        root = self.path(folder)
        infos = self.filesystem.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        below = (info.path.removeprefix(root).strip("/").partition("/") for info in infos if info.is_file)
        return sorted({name for name, deeper, _ in below if deeper})

    def is_empty(self) -> bool:
        """Whether nothing but a run's marker is here. Raises OutputError where `location` is a file or cannot be
        listed."""
        try:
            infos = self.filesystem.get_file_info(FileSelector(self.path(""), allow_not_found=True))
        except OSError as error:
            raise OutputError(f"{self.location} cannot be listed: {error}; give another OUT") from error
        return all(info.base_name == LEASE_FILE for info in infos)

    @retried
    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            data: bytes = stream.read()
        return data

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Put the file in its place, atomically. Raises OutputError naming the file and the cause."""
        try:
            self._put(name, data)
        except OSError as error:
            raise OutputError(f"cannot write {self.shown(name)}: {error}; mend it and run again") from error

    @retried
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
        value = json.loads(self.read_bytes(name))
        if not isinstance(value, dict):
            raise OutputError(f"{self.shown(name)} does not hold a JSON object")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def open_parquet(self, name: str) -> pq.ParquetFile:
        """Raises OutputError where the file is damaged, FileNotFoundError where it is not there."""
        try:
            return pq.ParquetFile(self.filesystem.open_input_file(self.path(name)))
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise OutputError(f"{self.shown(name)} is damaged: {error}") from error

    @retried
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.open_parquet(name) as file:
            return file.read(columns, use_threads=False)

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> pa.Buffer:
        """Write `table` as one Parquet file, atomically; returns the bytes written."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
        data = sink.getvalue()
        self.write_bytes(name, data)
        return data

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Buffer:
        """Write a stream of tables as one Parquet file, atomically, in row groups of about 2,000 rows; returns the
        bytes written."""
        sink, waiting, num_waiting = pa.BufferOutputStream(), [], 0
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

    @retried
    def delete(self, name: str) -> None:
        """Delete a file; one that has gone is no error, whatever a store calls it."""
        try:
            self.filesystem.delete_file(self.path(name))
        except OSError:
            if self.exists(name):
                raise

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all it holds; one that has gone is no error."""
        try:
            self.filesystem.delete_dir(self.path(name))
        except OSError:
            if self.list_names(name) or self.list_folders(name):
                raise

    def sweep(self, folder: str) -> None:
        """Remove what killed writers left in `folder`. Only for a folder that no live writer uses."""
        if not self.is_local:
            return
        infos = self.filesystem.get_file_info(FileSelector(self.path(folder), allow_not_found=True, recursive=True))
        for info in infos:
            if info.is_file and info.base_name.endswith(_TEMPORARY):
                os.unlink(info.path)


def sync_folder(folder: str | Path) -> None:
    """Make a new name in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
