"""Checksums inside the files of OUT, so that a reader notices bytes that are not those that were written.

A Parquet file holds the SHA-256 of all its other bytes in its footer, and a CRC of each page; a JSON record holds the
SHA-256 of its content. File and checksum are one file and are written in one step: there is no moment at which one is
there without the other. Files of versions before this one have none, and are read as they are.
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
# In the footer (Thrift's compact protocol) a key is followed by the field header and the length of its value.
_MARKER = _KEY + b"\x18" + bytes([_LENGTH])
# What a parser of Arrow raises for bytes that are no whole Parquet file.
PARSE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


def to_parquet(
    schema: pa.Schema, tables: Iterable[pa.Table], row_group_size: int | None = None, compression: str = "zstd"
) -> bytes:
    """Return tables as one Parquet file with its checksums; each table begins a row group.

    Without dictionaries, captions tables are smaller and are read and written in less time: most columns hold a
    different value in each row, and zstd finds those that repeat.
    """
    sink = pa.BufferOutputStream()
    settings = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(sink, schema, **settings) as writer:
        for table in tables:
            writer.write_table(table, row_group_size)
        writer.add_key_value_metadata({_KEY.decode(): "0" * _LENGTH})
    data = bytearray(sink.getvalue())
    start, end = _checksum_span(data)
    data[start:end] = _checksum_around(data, start, end)
    return bytes(data)


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file as a table: these columns, or all. Raises ValueError where its bytes are damaged."""
    matches = parquet_matches(data)
    if matches is False:
        raise ValueError("its bytes are not those that were written")
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=matches is None) as file:
            table = file.read(columns, use_threads=False)
        if matches is None:
            table.validate(full=True)
    except PARSE_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    missing = sorted(set(columns or ()) - set(table.column_names))
    if missing:
        raise ValueError(f"it has no column {missing[0]}")
    return table


def parquet_matches(data: bytes) -> bool | None:
    """Return whether a Parquet file has the bytes that were written; None where it holds no checksum of its own."""
    start, end = _checksum_span(data)
    if start < 0 or data[start : start + _SIZE_DIGITS] != _size_of(data):
        return None
    return data[start:end] == _checksum_around(data, start, end)


def _checksum_span(data: bytes | bytearray) -> tuple[int, int]:
    marker = data.rfind(_MARKER)
    start = marker + len(_MARKER) if marker >= 0 else -1
    return start, start + _LENGTH


def _checksum_around(data: bytes | bytearray, start: int, end: int) -> bytes:
    view = memoryview(data)
    digest = sha256(view[:start])
    digest.update(view[end:])
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
