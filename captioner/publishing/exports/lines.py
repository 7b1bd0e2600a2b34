"""Export JSON Lines: one object with every field for each text."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from captioner.publishing.exports.context import Export, write_line
from captioner.publishing.exports.destination import new_file
from captioner.publishing.exports.select import as_json


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write one JSON object a line for each text."""
    with new_file(export.dest) as path, path.open("w", encoding="utf-8") as file:
        for rows in texts:
            for row in rows.to_pylist():
                write_line(file, as_json(row))
