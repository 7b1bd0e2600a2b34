"""Commit the rows of one chunk; merge the committed chunks of a generation into captions/.

A chunk is one file whose name depends on plan and chunk, never on the writer. A retry, a re-execution or a writer left
over from a killed run replaces it with the same rows. A chunk is committed when its file exists.

Every step of publishing replaces one whole file, so a publish that was killed starts again and does only what is
missing: existing parts stay, and chunks are deleted only after the generation's record is written. Nothing that is
read here is trusted: a chunk whose bytes are not those that were written is deleted, and its images are captioned
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256

import pyarrow as pa

from captioner.console.text import counted
from captioner.data import Chunk
from captioner.errors import DamagedFileError, OutputError
from captioner.store.read import read_chunk, replace_rows, superseded_rows
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name


def publish(table: CaptionsTable, plan: Plan, on_part: Callable[[int], None] = lambda part: None) -> list[str]:
    """Move the rows of a completely committed generation into captions/. `on_part` is called after each part.

    Needs memory for a few chunks and one written file, whatever the size of the table. Returns a sentence for each
    file that was damaged or missing: those are deleted, nothing more is published, and the caller captions the chunks
    that are missing then.
    """
    published = table.published_parts() if plan.adds_parts else set()
    files, problems = {}, list[str]()
    for part in sorted(plan.parts):
        table.check_current()
        try:
            data = _publish_part(table, plan, part, part in published)
            files[part] = {"sha256": sha256(data).hexdigest(), "num_bytes": len(data)}
        except DamagedFileError:
            damaged = _delete_damaged(table, plan, part, part in published)
            if not damaged:
                raise
            problems += damaged
        on_part(part)
    if not problems:
        table.write_published(plan.generation, files)
        remove_merged_chunks(table)
    return problems


def remove_merged_chunks(table: CaptionsTable) -> None:
    """Delete the chunk files of published generations, also those that late writers of killed runs left."""
    for plan in table.plans():
        if table.is_published(plan.generation):
            for chunk_id in table.committed_chunks(plan.generation):
                table.directory.delete(table.chunk_name(chunk_id))


def missing_chunks(table: CaptionsTable, plan: Plan) -> list[Chunk]:
    """Return the chunks of a plan whose rows are neither committed nor published."""
    committed = table.committed_chunks(plan.generation)
    published = table.published_parts() if plan.adds_parts else set()
    chunks = [chunk for chunk in plan.chunks() if chunk.part not in published and chunk.chunk_id not in committed]
    if plan.adds_parts or not chunks:
        return chunks
    superseding = {part for part in {chunk.part for chunk in chunks} if has_rows_of(table, plan, part)}
    return [chunk for chunk in chunks if chunk.part not in superseding]


def has_rows_of(table: CaptionsTable, plan: Plan, part: int) -> bool:
    """Return whether a published part already has the rows of a plan that captions some of it again, or later ones."""
    generations = table.directory.read_table(captions_name(part), ["generation"])["generation"].to_numpy()
    return bool((generations[superseded_rows(table, plan, part)] >= plan.generation).all())


def _publish_part(table: CaptionsTable, plan: Plan, part: int, is_published: bool) -> bytes:
    """Write a part, unless it is there already, and return its bytes. Raises DamagedFileError."""
    name = captions_name(part)
    if is_published or (not plan.adds_parts and has_rows_of(table, plan, part)):
        # Of a generation that supersedes rows, they were written before a kill; the older ones are in history/.
        return table.directory.read_checked(name)
    if plan.adds_parts:
        return table.directory.write_tables(name, table.schema, _committed_rows(table, plan, part))
    current = table.directory.read_table(name)
    newer = pa.concat_tables(_committed_rows(table, plan, part))
    indices = superseded_rows(table, plan, part)
    table.directory.write_table(history_name(plan.generation, part), current.take(indices))
    return table.directory.write_table(name, replace_rows(current, indices, newer))


def _committed_rows(table: CaptionsTable, plan: Plan, part: int) -> Iterator[pa.Table]:
    """Yield the rows of a part, chunk by chunk, each compared with the plan. Raises DamagedFileError."""
    planned = table.read_plan_part(plan, part, ["image_id"])["image_id"]
    for chunk in plan.part_chunks(part):
        yield _planned_rows(table, plan, chunk, planned)


def _planned_rows(table: CaptionsTable, plan: Plan, chunk: Chunk, planned: pa.ChunkedArray) -> pa.Table:
    rows = read_chunk(table, chunk)
    if not rows["image_id"].equals(planned.slice(chunk.index * plan.rows_per_chunk, chunk.num_rows)):
        name = table.chunk_name(chunk.chunk_id)
        raise table.directory.damage(name, "is damaged: its rows are not the planned images")
    return rows


def _delete_damaged(table: CaptionsTable, plan: Plan, part: int, is_published: bool) -> list[str]:
    """Delete the damaged files of a part whose rows can be captioned again, and return a sentence for each.

    Raises DamagedFileError where the plan itself is damaged, or a part of which a plan captions only some rows again.
    """
    planned = table.read_plan_part(plan, part, ["image_id"])["image_id"]
    problems = []
    if is_published:
        table.directory.delete(captions_name(part))
        problems.append(f"{captions_name(part)} was damaged; its images are captioned again")
    elif not plan.adds_parts:
        table.directory.read_checked(captions_name(part))
    for chunk in plan.part_chunks(part):
        try:
            _planned_rows(table, plan, chunk, planned)
        except DamagedFileError as error:
            what = str(error).rpartition("; ")[0]
            table.directory.delete(table.chunk_name(chunk.chunk_id))
            if not is_published:
                problems.append(f"{what}; captioning {counted(chunk.num_rows, 'image')} again")
    return problems


def commit_chunk(table: CaptionsTable, chunk: Chunk, rows: pa.Table) -> None:
    """Make the rows of a chunk part of the table, atomically.

    Raises OutputError unless they are one row for each image of the chunk, in its order.
    """
    chunk_rows = rows["chunk_row"].to_pylist()
    if chunk_rows != list(range(chunk.num_rows)):
        raise OutputError(
            f"chunk {chunk.chunk_id}: {counted(len(chunk_rows), 'row')} for {counted(chunk.num_rows, 'image')}"
        )
    table.directory.write_table(table.chunk_name(chunk.chunk_id), rows.cast(table.schema))
