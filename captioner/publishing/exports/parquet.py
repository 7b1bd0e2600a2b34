"""Export Parquet: one file of CHOSEN_SCHEMA."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import new_file
from captioner.publishing.exports.select import CHOSEN_SCHEMA


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write all texts to one zstd-compressed Parquet file."""
    with new_file(export.dest) as path, pq.ParquetWriter(path, CHOSEN_SCHEMA, compression="zstd") as writer:
        for rows in texts:
            writer.write_table(rows)
