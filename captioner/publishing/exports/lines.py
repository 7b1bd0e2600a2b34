"""JSONL: every field of every text, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from captioner.exports.chosen import as_json
from captioner.exports.destination import new_file
from captioner.exports.export import Export, write_line


def write(texts: Iterator[pa.Table], export: Export) -> None:
    with new_file(export.dest) as path, path.open("w", encoding="utf-8") as file:
        for rows in texts:
            for row in rows.to_pylist():
                write_line(file, as_json(row))
