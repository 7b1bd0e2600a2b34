"""Commit the rows of one chunk; merge the committed chunks of a generation into captions/.

A chunk is one file whose name depends on plan and chunk, never on the writer. A retry, a re-execution or a writer left
over from a killed run replaces it with the same rows. A chunk is committed when its file exists.

Every step of publishing replaces one whole file, so a publish that was killed starts again and does only what is
missing: existing parts stay, and the chunks of a part are deleted only after the part is written. Nothing that is read
here is trusted: a chunk whose bytes are not those that were written is deleted, and its images are captioned again.

A `PartPublisher` publishes each part when its last chunk is committed, while others are captioned: there are never more
chunks than those of a few parts, whatever the size of the table, and `publish` has little left to do at the end.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any

import pyarrow as pa

from captioner.console.text import counted
from captioner.data import Chunk
from captioner.errors import DamagedFileError, OutputError
from captioner.run.prefetch import in_parallel
from captioner.store.counts import TableCounts
from captioner.store.read import read_chunk, replace_rows, superseded_rows
from captioner.store.repair import unchanged_parts
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name

# Parts that are published at the same time in a store, each with memory for its rows and its file. On a disk one thread
# takes less CPU time than several, and no longer.
PARTS_AT_ONCE = min(4, os.cpu_count() or 1)
# Chunks of a part that are read or deleted at the same time in a store, which takes some 30 ms to answer.
REQUESTS_AT_ONCE = 16
# The record of the parts so far is written when it lacks one part in so many. Written after each part, what is written
# of it would grow with the square of the parts: 700 MB for 2,000 of them.
PARTS_FOR_ONE_UNRECORDED = 200

OnPart = Callable[[int], None]


def publish(table: CaptionsTable, plan: Plan, on_part: OnPart = lambda part: None) -> list[str]:
    """Move the rows of a completely committed generation into captions/. `on_part` is called after each part.

    Needs memory for one part on a disk, and for PARTS_AT_ONCE in a store, whatever the size of the table. Returns a
    sentence for each file that was damaged or missing: those are deleted, nothing more is published, and the caller
    captions the chunks that are missing then.
    """
    published = table.published_parts() if plan.adds_parts else set()
    files = {part: file for part, file in _unchanged_files(table, plan).items() if part in published}
    problems: list[str] = []
    parts = [part for part in sorted(plan.parts) if part not in files]

    def parts_of_this_table() -> Iterator[int]:
        for part in parts:
            table.check_current()
            yield part

    results = in_parallel(
        lambda part: _publish_or_delete(table, plan, part, part in published),
        parts_of_this_table(),
        _parts_at_once(table),
    )
    with closing(results):
        for part, (file, damaged) in zip(parts, results, strict=True):
            problems += damaged
            if file is not None:
                files[part] = file
            on_part(part)
    if not problems:
        table.write_published(plan.generation, files)
        remove_merged_chunks(table)
    return problems


def _unchanged_files(table: CaptionsTable, plan: Plan) -> dict[int, dict[str, Any]]:
    """Return the record of the parts of a plan that a PartPublisher published, and that nobody has changed since."""
    if not plan.adds_parts:
        return {}
    files = table.files_so_far(plan.generation)
    unchanged = unchanged_parts(table, [plan], files)
    return {part: file for part, file in files.items() if part in unchanged and part in plan.parts and file["counts"]}


def remove_merged_chunks(table: CaptionsTable) -> None:
    """Delete the chunk files of published generations, also those that late writers of killed runs left."""
    for plan in table.plans():
        if table.is_published(plan.generation):
            _delete_chunks(table, table.committed_chunks(plan.generation))


def _delete_chunks(table: CaptionsTable, chunk_ids: Iterable[str]) -> None:
    def delete(chunk_id: str) -> None:
        table.directory.delete(table.chunk_name(chunk_id))

    for _ in in_parallel(delete, iter(sorted(chunk_ids)), _requests_at_once(table)):
        pass


def _parts_at_once(table: CaptionsTable) -> int:
    return 1 if table.directory.is_local else PARTS_AT_ONCE


def _requests_at_once(table: CaptionsTable) -> int:
    return 1 if table.directory.is_local else REQUESTS_AT_ONCE


class PartPublisher:
    """Publishes each part of a plan when all its chunks are committed; a context manager.

    `chunks`: those of the plan that are missing now. `check_held`: raises OutputError where OUT is no longer this
    run's. Parts of which a file is damaged, and those of plans that supersede rows, are left to `publish`, which also
    reads those that the record lacks.
    """

    def __init__(
        self, table: CaptionsTable, plan: Plan, chunks: Iterable[Chunk], check_held: Callable[[], None] = lambda: None
    ) -> None:
        self._table, self._plan, self._check_held = table, plan, check_held
        self._num_missing = Counter(chunk.part for chunk in chunks) if plan.adds_parts else Counter[int]()
        self._files = _unchanged_files(table, plan)
        self._num_unrecorded = 0
        self._lock = threading.Lock()
        self._pending: list[Future[None]] = []
        self._threads = ThreadPoolExecutor(_parts_at_once(table), thread_name_prefix="publishing")

    def __enter__(self) -> PartPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what has begun. Raises what went wrong in it, unless there is an error already."""
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()

    def add(self, chunk_id: str) -> None:
        """Note that a chunk is committed. Raises what went wrong with parts that were published before."""
        if not self._num_missing:
            return
        part = int(chunk_id.split("-")[1])
        self._num_missing[part] -= 1
        if not self._num_missing[part]:
            self._pending.append(self._threads.submit(self._publish, part))
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def _publish(self, part: int) -> None:
        self._check_held()
        with self._lock:
            self._table.check_current()
        try:
            file = _publish_part(self._table, self._plan, part, is_published=False)
        except DamagedFileError:
            return
        with self._lock:
            self._files[part] = file
            self._num_unrecorded += 1
            if self._num_unrecorded * PARTS_FOR_ONE_UNRECORDED >= len(self._files):
                self._table.write_files_so_far(self._plan.generation, self._files)
                self._num_unrecorded = 0
        _delete_chunks(self._table, (chunk.chunk_id for chunk in self._plan.part_chunks(part)))


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


def _publish_or_delete(
    table: CaptionsTable, plan: Plan, part: int, is_published: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Publish a part; or else delete its damaged files, and return a sentence for each."""
    try:
        return _publish_part(table, plan, part, is_published), []
    except DamagedFileError:
        damaged = _delete_damaged(table, plan, part, is_published)
        if not damaged:
            raise
        return None, damaged


def _publish_part(table: CaptionsTable, plan: Plan, part: int, is_published: bool) -> dict[str, Any]:
    """Write a part, unless it is there already, and return its entry in the record. Raises DamagedFileError."""
    name, counts = captions_name(part), TableCounts()
    if is_published or (not plan.adds_parts and has_rows_of(table, plan, part)):
        # Of a generation that supersedes rows, they were written before a kill; the older ones are in history/.
        file = table.directory.read_checked(name)
        counts.add_rows(table.directory.decoded(name, file, table.counted_columns), table.answer_columns)
    elif plan.adds_parts:
        counted_columns: list[pa.Table] = []
        with closing(_committed_rows(table, plan, part)) as rows_of_chunks:
            noted = _noted(table, rows_of_chunks, counted_columns)
            file = table.directory.write_tables(name, table.schema, noted)
        counts.add_rows(pa.concat_tables(counted_columns), table.answer_columns)
    else:
        current = table.directory.read_table(name)
        newer = pa.concat_tables(_committed_rows(table, plan, part))
        indices = superseded_rows(table, plan, part)
        table.directory.write_table(history_name(plan.generation, part), current.take(indices))
        rows = replace_rows(current, indices, newer)
        counts.add_rows(rows, table.answer_columns)
        file = table.directory.write_table(name, rows)
    return {"sha256": file.sha256, "num_bytes": len(file.data), "counts": counts.to_record()}


def _noted(table: CaptionsTable, tables: Iterable[pa.Table], counted_columns: list[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same tables, and append to a list the columns by which their rows are counted."""
    names = table.counted_columns
    for rows in tables:
        counted_columns.append(rows.select(names))
        yield rows


def _committed_rows(table: CaptionsTable, plan: Plan, part: int) -> Generator[pa.Table, None, None]:
    """Yield the rows of a part, chunk by chunk, each compared with the plan. Raises DamagedFileError."""
    planned = table.read_plan_part(plan, part, ["image_id"])["image_id"]
    read = partial(_planned_rows, table, plan, planned)
    return in_parallel(read, iter(plan.part_chunks(part)), _requests_at_once(table))


def _planned_rows(table: CaptionsTable, plan: Plan, planned: pa.ChunkedArray, chunk: Chunk) -> pa.Table:
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
            _planned_rows(table, plan, planned, chunk)
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
