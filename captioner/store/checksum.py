"""Checksums inside the files of OUT, so that a reader notices bytes that are not those that were written.

A Parquet or Arrow IPC file holds the SHA-256 of all its other bytes in its footer, and a Parquet file a CRC of each
page; a JSON record holds the SHA-256 of its content. File and checksum are one file and are written in one step: there
is no moment at which one is there without the other. Files of the first versions have none, and are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
_FILTERED = ("image_id", "status", "error_code")  # columns of text by which rows are looked for
# What a parser of Arrow raises for bytes that are no whole file.
PARSE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


def to_parquet(schema: pa.Schema, tables: Iterable[pa.Table], row_group_size: int | None = None) -> bytes:
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


def to_arrow(table: pa.Table) -> bytes:
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


def _with_checksum_in_footer(file: pa.Buffer, marker: bytes) -> bytes:
    data = bytearray(file)
    start = data.rfind(marker) + len(marker)
    data[start : start + _LENGTH] = _checksum_around(data, start)
    return bytes(data)


def from_file(name: str, data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Return a file, Arrow IPC or Parquet by its name, as a table: these columns, or all.

    Raises ValueError where its bytes are damaged, or a column is missing.
    """
    is_whole = file_matches(name, data)
    if is_whole is False:
        raise ValueError("its bytes are not those that were written")
    return decoded(name, data, columns, check=is_whole is None)


def decoded(name: str, data: bytes, columns: list[str] | None = None, check: bool = False) -> pa.Table:
    """Do as `from_file` with bytes whose checksum matches; `check`: which have none."""
    read = _read_arrow if name.endswith(ARROW_SUFFIX) else _read_parquet
    try:
        table = read(data, columns, check)
    except PARSE_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    missing = sorted(set(columns or ()) - set(table.column_names))
    if missing:
        raise ValueError(f"it has no column {missing[0]}")
    return table


def _read_parquet(data: bytes, columns: list[str] | None, check: bool) -> pa.Table:
    """Return columns of a Parquet file. `check`: check its pages and values, as it has no checksum."""
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=check) as file:
        table = file.read(columns, use_threads=False)
    if check:
        table.validate(full=True)
    return table


def _read_arrow(data: bytes, columns: list[str] | None, check: bool) -> pa.Table:
    """Return columns of an Arrow IPC file, which is only read where its checksum matches."""
    with pa.ipc.open_file(pa.BufferReader(data), options=pa.ipc.IpcReadOptions(use_threads=False)) as file:
        table = file.read_all()
    names = table.column_names if columns is None else [name for name in table.column_names if name in columns]
    return table if len(names) == table.num_columns else table.select(names)


def file_matches(name: str, data: bytes) -> bool | None:
    """Return whether a file has the bytes that were written; None for a Parquet file that holds no checksum."""
    if name.endswith(ARROW_SUFFIX):
        return bool(_matches(data, _ARROW_MARKER))
    return _matches(data, _PARQUET_MARKER)


def has_checksum(name: str, data: bytes) -> bool:
    """Return whether a file holds a checksum of its own, matching or not."""
    return name.endswith(ARROW_SUFFIX) or _checksum_start(data, _PARQUET_MARKER) is not None


def _matches(data: bytes, marker: bytes) -> bool | None:
    start = _checksum_start(data, marker)
    return None if start is None else data[start : start + _LENGTH] == _checksum_around(data, start)


def _checksum_start(data: bytes, marker: bytes) -> int | None:
    """Return where the checksum of a file stands; None where it has none, or that of a file of another size."""
    index = data.rfind(marker)
    start = index + len(marker)
    return start if index >= 0 and data[start : start + _SIZE_DIGITS] == _size_of(data) else None


def _checksum_around(data: bytes | bytearray, start: int) -> bytes:
    view = memoryview(data)
    digest = sha256(view[:start])
    digest.update(view[start + _LENGTH :])
    return _size_of(data) + b"-" + digest.hexdigest().encode()


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
