"""Export CSV with the columns that a publishing system expects, safe from formula injection."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.errors import UsageError
from captioner.publishing.exports.context import Export, write_origin
from captioner.publishing.exports.destination import new_file
from captioner.publishing.exports.select import CHOSEN_SCHEMA, PROVENANCE, as_json

# `file_name`: the last part of the image id. `file_hash`: SHA-1 of the file, which has to be read for it.
FIELDS = (*CHOSEN_SCHEMA.names, "file_name", "file_hash")
_DEFAULT = ("image_id", "uri", "alt_text", "language", *PROVENANCE)
# WordPress: the columns that alt text import plugins read. Wagtail: `file_hash` identifies an image and `description`
# is its alt text (wagtail.images.models).
PRESETS = {
    "wordpress": {"filename": "file_name", "alt_text": "alt_text"},
    "wagtail": {"file_hash": "file_hash", "filename": "file_name", "description": "alt_text"},
}
WAGTAIL_LIMIT = 255
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write the CSV; when its columns do not hold the provenance, write that to DEST.provenance.jsonl."""
    columns = chosen_columns(export.settings)
    origins = export.dest.with_name(f"{export.dest.name}.provenance.jsonl")
    with ExitStack() as stack:
        path = stack.enter_context(new_file(export.dest))
        # Excel takes a CSV for UTF-8 only with a byte order mark, which importers take for a part of the first name.
        encoding = "utf-8" if export.settings.preset else "utf-8-sig"
        file = stack.enter_context(path.open("w", encoding=encoding, newline=""))
        origin_file = None
        if not set(PROVENANCE) <= set(columns.values()):
            origin_file = stack.enter_context(stack.enter_context(new_file(origins)).open("w", encoding="utf-8"))
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in _rows(texts, export, columns.values()):
            writer.writerow([safe_cell(row[field]) for field in columns.values()])
            if origin_file:
                write_origin(origin_file, row)


def chosen_columns(settings: ExportConfig) -> dict[str, str]:
    """Return the fields by column header. Raises UsageError for an unknown field."""
    if settings.preset and settings.columns:
        raise UsageError("--preset and --columns exclude each other; give one of them")
    if settings.preset:
        return PRESETS[settings.preset]
    columns = dict(_parse_column(column) for column in settings.columns)
    if len(columns) < len(settings.columns):
        raise UsageError(f"--columns {','.join(settings.columns)}: a name is given twice; give each once")
    return columns or {name: name for name in _DEFAULT}


def _parse_column(text: str) -> tuple[str, str]:
    name, _, field = text.partition("=")
    if (field or name) not in FIELDS:
        raise UsageError(f"--columns {text}: should be NAME=FIELD; fields are {', '.join(FIELDS)}")
    return name, field or name


def safe_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet evaluates: text that begins like a formula gets an apostrophe in front.

    Numbers stay numbers. Source: OWASP, CSV Injection.
    """
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return f"'{value}"
    return value


def _rows(texts: Iterator[pa.Table], export: Export, fields: Iterable[str]) -> Iterator[dict[str, Any]]:
    for table in texts:
        rows = _with_file_hash(table, export) if "file_hash" in fields else table.to_pylist()
        for row in rows:
            if export.settings.preset == "wagtail" and len(row["alt_text"]) > WAGTAIL_LIMIT:
                export.tally.leave_out(row, f"longer than the {WAGTAIL_LIMIT} characters that Wagtail takes")
                continue
            yield as_json(row) | {"file_name": row["image_id"].replace("\\", "/").rpartition("/")[2]}


def _with_file_hash(table: pa.Table, export: Export) -> Iterator[dict[str, Any]]:
    for row, raw in export.originals.read(table):
        if raw.data is None:
            export.tally.leave_out(row, f"image cannot be read: {raw.error_code}")
        else:
            yield row | {"file_hash": hashlib.sha1(raw.data, usedforsecurity=False).hexdigest()}
