"""Commit the rows of one chunk; merge the committed chunks of a generation into captions/.

A chunk is one file whose name depends on plan and chunk, never on the writer. A retry, a re-execution or a writer left
over from a killed run replaces it with the same rows. A chunk is committed when its file exists.

Every step of publishing replaces one whole file, so a publish that was killed starts again and does only what is
missing: existing parts stay, and chunks are deleted only after the generation's record is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captioner.data import Chunk
from captioner.errors import OutputError, VerificationError
from captioner.store.table import (
    CaptionsTable,
    Plan,
    captions_name,
    history_name,
    plan_part_name,
    published_name,
)


def publish(table: CaptionsTable, plan: Plan, on_part: Callable[[int], None] = lambda part: None) -> None:
    """Move the rows of a completely committed generation into captions/. `on_part` is called after each part.

    Needs memory for a few chunks and one written file, whatever the size of the table. Raises VerificationError
    where a part does not hold exactly the planned images.
    """
    published = table.published_parts()
    files = {}
    for part in sorted(plan.parts):
        table.check_current()
        data: pa.Buffer | bytes
        if not plan.adds_parts:
            data = _supersede(table, plan, part)
        elif part in published:
            data = table.directory.read_bytes(captions_name(part))
        else:
            data = table.directory.write_tables(captions_name(part), table.schema, _committed_rows(table, plan, part))
        files[str(part)] = {"sha256": sha256(data).hexdigest(), "num_bytes": len(data)}
        on_part(part)
    table.directory.write_json(published_name(plan.generation), {"files": files})
    remove_merged_chunks(table)


def remove_merged_chunks(table: CaptionsTable) -> None:
    """Delete the chunk files of published generations, also those that late writers of killed runs left."""
    for plan in table.plans():
        if table.is_published(plan.generation):
            for chunk_id in table.committed_chunks(plan.generation):
                table.directory.delete(table.chunk_name(chunk_id))


def _committed_rows(table: CaptionsTable, plan: Plan, part: int) -> Iterator[pa.Table]:
    """Yield the rows of a part, chunk by chunk, each compared with the plan."""
    with table.directory.open_parquet(plan_part_name(plan.generation, part)) as planned:
        for chunk in plan.part_chunks(part):
            rows = table.directory.read_table(table.chunk_name(chunk.chunk_id))
            ids = planned.read_row_group(chunk.index, ["image_id"])["image_id"]
            if not rows["image_id"].equals(ids):
                raise VerificationError(
                    f"chunk {chunk.chunk_id}: its rows are not the planned images; see `captioner verify`"
                )
            yield rows


def _supersede(table: CaptionsTable, plan: Plan, part: int) -> pa.Buffer | bytes:
    """Replace the rows of a published part that a later generation captioned again; older rows go to history/ first.

    A part that already has this generation's rows was written before a kill, and its older rows are in history/.
    """
    current = table.directory.read_table(captions_name(part))
    indices = table.directory.read_table(plan_part_name(plan.generation, part), ["part_row"])["part_row"].to_numpy()
    older = current.take(indices)
    if set(older["generation"].to_pylist()) == {plan.generation}:
        return table.directory.read_bytes(captions_name(part))
    newer = pa.concat_tables(_committed_rows(table, plan, part))
    table.directory.write_table(history_name(plan.generation, part), older)
    return table.directory.write_table(captions_name(part), replace_rows(current, indices, newer))


def replace_rows(rows: pa.Table, indices: npt.NDArray[np.int64], newer: pa.Table) -> pa.Table:
    """Return `rows` with the row at `indices[i]` replaced by row i of `newer`."""
    order = np.arange(rows.num_rows)
    order[indices] = rows.num_rows + np.arange(len(indices))
    return pa.concat_tables([rows, newer.cast(rows.schema)]).take(order).combine_chunks()


def commit_chunk(table: CaptionsTable, chunk: Chunk, rows: pa.Table) -> None:
    """Make the rows of a chunk part of the table, atomically.

    Raises OutputError unless they are one row for each image of the chunk, in its order.
    """
    chunk_rows = rows["chunk_row"].to_pylist()
    if chunk_rows != list(range(chunk.num_rows)):
        raise OutputError(f"chunk {chunk.chunk_id}: {len(chunk_rows)} rows for {chunk.num_rows} images")
    table.directory.write_table(table.chunk_name(chunk.chunk_id), rows.cast(table.schema))
