"""Checksums inside the files of OUT, so that a reader notices bytes that are not those that were written.

A Parquet or Arrow IPC file holds the SHA-256 of all its other bytes in its footer, and a Parquet file a CRC of each
page; a JSON record holds the SHA-256 of its content. File and checksum are one file and are written in one step: there
is no moment at which one is there without the other. Files of the first versions have none, and are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

JSON_KEY = "content_sha256"
_KEY = b"captioner.sha256"
# The value: the length of the file in bytes, and the digest. A program that writes the rows anew may copy the value
# into its own file, about which it then says nothing.
_SIZE_DIGITS, _DIGEST_DIGITS = 16, 64
_LENGTH = _SIZE_DIGITS + 1 + _DIGEST_DIGITS
# In a Parquet footer (Thrift's compact protocol) a key is followed by the field header and the length of its value.
_PARQUET_MARKER = _KEY + b"\x18" + bytes([_LENGTH])
_ARROW_MARKER = _KEY + b"="
ARROW_SUFFIX = ".arrow"
_NOT_WHOLE = "its bytes are not those that were written"
_FILTERED = ("image_id", "status", "error_code")  # columns of text by which rows are looked for
# What a parser of Arrow raises for bytes that are no whole file.
PARSE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


@dataclass(frozen=True, slots=True)
class WholeFile:
    """The bytes of a file, which are those that were written, and their SHA-256 in hexadecimal digits."""

    data: bytes | bytearray
    sha256: str


def to_parquet(schema: pa.Schema, tables: Iterable[pa.Table], row_group_size: int | None = None) -> WholeFile:
    """Return tables as one Parquet file with its checksums; each table begins a row group.

    Without dictionaries, captions tables are smaller and are read and written in less time: most columns hold a
    different value in each row, and zstd finds those that repeat.
    """
    sink = pa.BufferOutputStream()
    # Least and largest values let a reader skip row groups; those of texts take an eighth of the time of writing.
    with_statistics = [field.name for field in schema if field.type != pa.string() or field.name in _FILTERED]
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=with_statistics,
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size)
        writer.add_key_value_metadata({_KEY.decode(): "0" * _LENGTH})
    return _with_checksum_in_footer(sink.getvalue(), _PARQUET_MARKER)


def to_arrow(table: pa.Table) -> WholeFile:
    """Return a table as one Arrow IPC file with its checksum.

    Of 512 rows it is written in a sixth, and read in a quarter, of the CPU time that a Parquet file takes.
    """
    # The schema stands at both ends of the file. The checksum is that of the second one, which readers use.
    schema = table.schema.with_metadata({_KEY: _ARROW_MARKER + b"0" * _LENGTH})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(table)
    return _with_checksum_in_footer(sink.getvalue(), _ARROW_MARKER)


def _with_checksum_in_footer(file: pa.Buffer, marker: bytes) -> WholeFile:
    data = bytearray(file)
    start = data.rfind(marker) + len(marker)
    data[start : start + _LENGTH], digest = _checksum_and_digest(data, start)
    return WholeFile(data, digest)


def whole_file(name: str, data: bytes) -> WholeFile:
    """Return a file, Arrow IPC or Parquet by its name, with its SHA-256.

    Raises ValueError where its bytes are not those that were written; without a checksum, where a page is damaged.
    """
    start = _checksum_start(name, data)
    if start is not None:
        checksum, digest = _checksum_and_digest(data, start)
        if data[start : start + _LENGTH] == checksum:
            return WholeFile(data, digest)
    if has_checksum(name, data):
        raise ValueError(_NOT_WHOLE)
    decoded(name, data, check=True)
    return WholeFile(data, sha256(data).hexdigest())


def from_file(name: str, data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Return a file, Arrow IPC or Parquet by its name, as a table: these columns, or all.

    Raises ValueError where its bytes are damaged, or a column is missing.
    """
    if not has_checksum(name, data):
        return decoded(name, data, columns, check=True)
    return decoded(name, whole_file(name, data).data, columns)


def decoded(name: str, data: bytes | bytearray, columns: list[str] | None = None, check: bool = False) -> pa.Table:
    """Do as `from_file` with bytes whose checksum matches; `check`: which have none."""
    read = _read_arrow if name.endswith(ARROW_SUFFIX) else _read_parquet
    try:
        table = read(data, columns, check)
    except PARSE_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if columns is not None and (missing := sorted(set(columns) - set(table.column_names))):
        raise ValueError(f"it has no column {missing[0]}")
    return table


def _read_parquet(data: bytes | bytearray, columns: list[str] | None, check: bool) -> pa.Table:
    """Return columns of a Parquet file. `check`: check its pages and values, as it has no checksum."""
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=check) as file:
        table = file.read(columns, use_threads=False)
    if check:
        table.validate(full=True)
    return table


def _read_arrow(data: bytes | bytearray, columns: list[str] | None, check: bool) -> pa.Table:
    """Return columns of an Arrow IPC file, which is only read where its checksum matches."""
    with pa.ipc.open_file(pa.BufferReader(data), options=pa.ipc.IpcReadOptions(use_threads=False)) as file:
        table = file.read_all()
    return table if columns is None else table.select([name for name in table.column_names if name in columns])


def has_checksum(name: str, data: bytes | bytearray) -> bool:
    """Return whether a file holds a checksum of its own, matching or not."""
    return name.endswith(ARROW_SUFFIX) or _checksum_start(name, data) is not None


def _checksum_start(name: str, data: bytes | bytearray) -> int | None:
    """Return where the checksum of a file stands; None where it has none, or that of a file of another size."""
    marker = _ARROW_MARKER if name.endswith(ARROW_SUFFIX) else _PARQUET_MARKER
    index = data.rfind(marker)
    start = index + len(marker)
    return start if index >= 0 and data[start : start + _SIZE_DIGITS] == _size_of(data) else None


def _checksum_and_digest(data: bytes | bytearray, start: int) -> tuple[bytes, str]:
    """Return the checksum of the bytes around `start`, and the SHA-256 of the file that holds it there.

    Nearly all bytes are before `start`, and are hashed once for both.
    """
    before, after = memoryview(data)[:start], memoryview(data)[start + _LENGTH :]
    around = sha256(before)
    whole = around.copy()
    around.update(after)
    checksum = _size_of(data) + b"-" + around.hexdigest().encode()
    whole.update(checksum)
    whole.update(after)
    return checksum, whole.hexdigest()


def _size_of(data: bytes | bytearray) -> bytes:
    return b"%0*d" % (_SIZE_DIGITS, len(data))


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of its content."""
    return value | {JSON_KEY: _json_digest(value)}


def without_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object without its checksum, if it has one. Raises ValueError where the content does not match."""
    content = {key: item for key, item in value.items() if key != JSON_KEY}
    if JSON_KEY in value and value[JSON_KEY] != _json_digest(content):
        raise ValueError("its content is not what was written")
    return content


def _json_digest(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
