"""Merge the committed chunks of a generation into captions/.

Every step is a file that is replaced whole, so a publish that was killed starts over and does only what is missing:
parts that are there stay, chunks are deleted only after the generation's record is written.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import numpy as np
import pyarrow as pa

from captioner.data import Chunk
from captioner.errors import VerificationError
from captioner.store.table import (
    CaptionsTable,
    Plan,
    captions_name,
    history_name,
    plan_part_name,
    published_name,
)


def publish(table: CaptionsTable, plan: Plan, on_part: Callable[[int], None] = lambda part: None) -> None:
    """Put the rows of a wholly committed generation into the published table. `on_part` is called after each part.

    Raises VerificationError where a part does not hold exactly the planned pictures.
    """
    published = table.published_parts()
    files = {}
    for part in sorted(plan.parts):
        if plan.founds_parts and part not in published:
            rows = _committed_rows(table, plan.part_chunks(part))
            _check_ids(table, plan, part, rows["image_id"])
            data = table.directory.write_table(captions_name(part), rows)
        elif not plan.founds_parts:
            data = _supersede(table, plan, part)
        else:
            data = table.directory.read_bytes(captions_name(part))
        files[str(part)] = {"sha256": sha256(data).hexdigest(), "num_bytes": len(data)}
        on_part(part)
    table.directory.write_json(published_name(plan.generation), {"files": files})
    remove_merged_chunks(table)


def remove_merged_chunks(table: CaptionsTable) -> None:
    """Delete chunk files of published generations: after a publish, and what late writers of killed runs put there."""
    for plan in table.plans():
        if table.is_published(plan.generation):
            for chunk_id in table.committed_chunks(plan.generation):
                table.directory.delete(table.chunk_name(chunk_id))


def _committed_rows(table: CaptionsTable, chunks: list[Chunk]) -> pa.Table:
    tables = [table.directory.read_table(table.chunk_name(chunk.chunk_id)) for chunk in chunks]
    return pa.concat_tables(tables).combine_chunks()


def _check_ids(table: CaptionsTable, plan: Plan, part: int, image_ids: pa.ChunkedArray) -> None:
    planned = table.directory.read_table(plan_part_name(plan.generation, part), ["image_id"])["image_id"]
    if planned.to_pylist() != image_ids.to_pylist():
        raise VerificationError(
            f"part {part} of generation {plan.generation}: committed rows are not the planned pictures; "
            "run `captioner verify` on the table"
        )


def _supersede(table: CaptionsTable, plan: Plan, part: int) -> pa.Buffer | bytes:
    """Replace the rows of a published part that a retry made anew; the older rows go to history/ first.

    A part that holds this generation's rows already was written before a kill and stays: its older rows are safe.
    """
    current = table.directory.read_table(captions_name(part))
    places = table.directory.read_table(plan_part_name(plan.generation, part), ["part_row"])["part_row"].to_numpy()
    older = current.take(places)
    if set(older["generation"].to_pylist()) == {plan.generation}:
        return table.directory.read_bytes(captions_name(part))
    newer = _committed_rows(table, plan.part_chunks(part))
    _check_ids(table, plan, part, newer["image_id"])
    table.directory.write_table(history_name(plan.generation, part), older)
    return table.directory.write_table(captions_name(part), replace_rows(current, places, newer))


def replace_rows(rows: pa.Table, places: np.ndarray, newer: pa.Table) -> pa.Table:
    """`rows` with the row at `places[i]` replaced by row i of `newer`."""
    order = np.arange(rows.num_rows)
    order[places] = rows.num_rows + np.arange(len(places))
    return pa.concat_tables([rows, newer.cast(rows.schema)]).take(order).combine_chunks()
