"""Parquet: the chosen texts as one file of CHOSEN_SCHEMA."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.exports.chosen import CHOSEN_SCHEMA
from captioner.exports.destination import new_file
from captioner.exports.export import Export


def write(texts: Iterator[pa.Table], export: Export) -> None:
    with new_file(export.dest) as path, pq.ParquetWriter(path, CHOSEN_SCHEMA, compression="zstd") as writer:
        for rows in texts:
            writer.write_table(rows)
