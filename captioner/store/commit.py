"""Commit the rows of one chunk: one file, its name a function of plan and chunk, never of who writes it.

A retry, a re-execution or a writer left over from a killed run puts the same file in the same
place. The file is there = the chunk is done.
"""

from __future__ import annotations

import pyarrow as pa

from captioner.data import Chunk
from captioner.errors import OutputError
from captioner.store.table import CaptionsTable


def commit_chunk(table: CaptionsTable, chunk: Chunk, rows: pa.Table) -> None:
    """Make the rows of a chunk part of the table, whole or not at all.

    Raises OutputError where they are not the chunk's rows: in its order, one for each picture.
    """
    numbers = rows["chunk_row"].to_pylist()
    if numbers != list(range(chunk.num_rows)):
        raise OutputError(f"chunk {chunk.chunk_id}: {len(numbers)} rows were made for {chunk.num_rows} pictures")
    table.directory.write_table(table.chunk_name(chunk.chunk_id), rows.cast(table.schema))
