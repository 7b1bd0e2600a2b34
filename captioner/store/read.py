"""Read a captions table, finished or not: the current committed row of each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from captioner.data import Chunk
from captioner.store.publish import replace_rows
from captioner.store.table import CaptionsTable, Plan, captions_name, plan_part_name


def read_parts(table: CaptionsTable, columns: Sequence[str] | None = None, every: int = 1) -> Iterator[pa.Table]:
    """Yield the committed rows, one part of the table (about --rows-per-file rows) at a time, in plan order.

    `every`: yield only one of so many parts. Of a run that is not finished, images without a committed row are left
    out; committed rows of an unfinished `--retry-failed` replace the older ones.
    """
    plans = table.plans()
    published = table.published_parts()
    retries = [plan for plan in plans if not plan.adds_parts and not table.is_published(plan.generation)]
    for plan in plans:
        committed = set() if table.is_published(plan.generation) else table.committed_chunks(plan.generation)
        for part in sorted(plan.parts)[::every] if plan.adds_parts else ():
            if part in published:
                rows = table.directory.read_table(captions_name(part), _list(columns))
                yield _with_newer_rows(table, rows, part, retries, columns)
            else:
                yield _read_chunks(table, plan.part_chunks(part), committed, columns)


def _with_newer_rows(
    table: CaptionsTable, rows: pa.Table, part: int, retries: list[Plan], columns: Sequence[str] | None
) -> pa.Table:
    for plan in retries:
        if part not in plan.parts:
            continue
        indices = table.directory.read_table(plan_part_name(plan.generation, part), ["part_row"])["part_row"].to_numpy()
        committed = table.committed_chunks(plan.generation)
        chunks = [chunk for chunk in plan.part_chunks(part) if chunk.chunk_id in committed]
        for chunk in chunks:
            first = chunk.index * plan.rows_per_chunk
            newer = _read_chunks(table, [chunk], committed, columns)
            rows = replace_rows(rows, np.asarray(indices[first : first + chunk.num_rows]), newer)
    return rows


def _read_chunks(
    table: CaptionsTable, chunks: list[Chunk], committed: set[str], columns: Sequence[str] | None
) -> pa.Table:
    names = [table.chunk_name(chunk.chunk_id) for chunk in chunks if chunk.chunk_id in committed]
    schema = table.schema if columns is None else pa.schema([table.schema.field(name) for name in columns])
    chunk_tables = [table.directory.read_table(name, _list(columns)) for name in names]
    return pa.concat_tables([schema.empty_table(), *chunk_tables])


def _list(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)
