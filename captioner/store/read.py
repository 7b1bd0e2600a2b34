"""Read a captions table, finished or not: the current committed row of each image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED, STATUS_OK, Chunk
from captioner.errors import DamagedFileError
from captioner.store.checksum import ARROW_SUFFIX
from captioner.store.table import CaptionsTable, Plan, captions_name, open_table

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

OnDamage = Callable[[DamagedFileError], None]


def raise_damage(error: DamagedFileError) -> None:
    """Raise the error: what readers do that were not told otherwise."""
    raise error


def read_parts(
    table: CaptionsTable,
    columns: Sequence[str] | None = None,
    every: int = 1,
    on_damage: OnDamage = raise_damage,
    whole_files: bool = True,
    besides: Collection[int] = (),
) -> Iterator[pa.Table]:
    """Yield the committed rows, one part of the table (about --rows-per-file rows) at a time, in plan order.

    `every`: yield only every n-th part. Of a run that is not finished, images without a committed row are left
    out; committed rows of an unfinished `--retry-failed` replace the older ones. `on_damage` is called for each file
    that is damaged or missing; where it returns, the rows of that file are left out. `whole_files`: compare published
    files with their checksums; without, only the pages of `columns` are read and checked. `besides`: parts that are
    left out.
    """
    plans = table.plans()
    open_plans = [plan for plan in plans if not table.is_published(plan.generation)]
    # Chunks are listed first: those of a part that a run publishes meanwhile are deleted after the part is there.
    committed = {plan.generation: table.committed_chunks(plan.generation) for plan in open_plans}
    published = table.published_parts()
    retries = [plan for plan in open_plans if not plan.adds_parts]
    for plan in plans:
        parts = sorted(plan.parts)[::every] if plan.adds_parts else []
        for part in (part for part in parts if part not in besides):
            try:
                if part in published or plan.generation not in committed:
                    rows = read_part(table, plan, part, columns, whole_files)
                    yield _with_newer_rows(table, rows, part, retries, columns, on_damage)
                    continue
                damage: list[DamagedFileError] = []
                rows = _read_chunks(table, plan.part_chunks(part), committed[plan.generation], columns, damage.append)
                if damage and part in table.published_parts():
                    rows, damage = read_part(table, plan, part, columns, whole_files), []
                for error in damage:
                    on_damage(error)
                yield rows
            except DamagedFileError as error:
                on_damage(error)


def read_part(
    table: CaptionsTable, plan: Plan, part: int, columns: Sequence[str] | None = None, whole_file: bool = True
) -> pa.Table:
    """Return the rows of a published part: these columns, or all. `whole_file`: see `read_parts`.

    Raises DamagedFileError where its file is damaged, missing, or that of another part.
    """
    name = captions_name(part)
    names = table.schema.names if columns is None else list(columns)
    read = table.directory.read_table if whole_file else table.directory.read_columns
    rows = read(name, list(dict.fromkeys([*names, "chunk_id"])))
    check_part(table, plan, part, rows)
    return rows.select(names)


def check_part(table: CaptionsTable, plan: Plan, part: int, rows: pa.Table) -> None:
    """Raise DamagedFileError where the rows of a published part, with `chunk_id`, are those of another part."""
    is_this_part = pc.all(pc.match_substring(rows["chunk_id"], f"-{part:05d}-")).as_py()
    if rows.num_rows != plan.parts[part] or not is_this_part:
        raise table.directory.damage(captions_name(part), "is damaged: it holds the rows of another part")


def read_chunk(table: CaptionsTable, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the committed rows of a chunk: these columns, or all.

    Raises DamagedFileError where its file is damaged, missing, or that of another chunk or table.
    """
    name = table.chunk_name(chunk.chunk_id)
    schema = table.schema if columns is None else pa.schema([table.schema.field(column) for column in columns])
    # Where all columns are wanted they are not named: looking for 27 names takes a third of the time of reading.
    read = table.directory.read_table(name, None if columns is None else sorted({*columns, "chunk_id"}))
    rows = read if columns is None else read.select(list(columns))
    if not rows.schema.equals(schema):
        raise table.directory.damage(name, "is damaged: its columns are not those of this table")
    if read.num_rows != chunk.num_rows or not pc.all(pc.equal(read["chunk_id"], chunk.chunk_id)).as_py():
        raise table.directory.damage(name, "is damaged: it holds the rows of another chunk")
    return rows


def _with_newer_rows(
    table: CaptionsTable,
    rows: pa.Table,
    part: int,
    retries: list[Plan],
    columns: Sequence[str] | None,
    on_damage: OnDamage,
) -> pa.Table:
    for plan in retries:
        if part not in plan.parts:
            continue
        committed = table.committed_chunks(plan.generation)
        for chunk in plan.part_chunks(part):
            if chunk.chunk_id in committed:
                try:
                    newer = read_chunk(table, chunk, columns)
                    indices = superseded_rows(table, plan, part)
                except DamagedFileError as error:
                    on_damage(error)
                    continue
                first = chunk.index * plan.rows_per_chunk
                rows = replace_rows(rows, indices[first : first + chunk.num_rows], newer)
    return rows


def superseded_rows(table: CaptionsTable, plan: Plan, part: int) -> npt.NDArray[np.int64]:
    """Return the indices, in the published part, of the rows that a plan captions again."""
    planned = table.read_plan_part(plan, part, ["part_row"])
    indices: npt.NDArray[np.int64] = planned["part_row"].to_numpy()
    return indices


def replace_rows(rows: pa.Table, indices: npt.NDArray[np.int64], newer: pa.Table) -> pa.Table:
    """Return `rows` with the row at `indices[i]` replaced by row i of `newer`."""
    order = np.arange(rows.num_rows)
    order[indices] = rows.num_rows + np.arange(len(indices))
    return pa.concat_tables([rows, newer.cast(rows.schema)]).take(order).combine_chunks()


def _read_chunks(
    table: CaptionsTable,
    chunks: list[Chunk],
    committed: set[str],
    columns: Sequence[str] | None,
    on_damage: OnDamage,
) -> pa.Table:
    schema = table.schema if columns is None else pa.schema([table.schema.field(name) for name in columns])
    chunk_tables = [schema.empty_table()]
    for chunk in chunks:
        if chunk.chunk_id in committed:
            try:
                chunk_tables.append(read_chunk(table, chunk, columns))
            except DamagedFileError as error:
                on_damage(error)
    return pa.concat_tables(chunk_tables)


@dataclass(frozen=True)
class TableDatasets:
    """A captions table as Arrow datasets, which are read where and when they are asked for.

    `rows`: the current row of each image. `history`: rows that `--retry-failed`, `--only` and `--extend` superseded.
    """

    rows: Dataset
    history: Dataset

    @property
    def captions(self) -> Dataset:
        """The rows that have a caption."""
        return self.rows.filter(pc.field("status") == STATUS_OK)

    @property
    def failed(self) -> Dataset:
        """The rows that have none, with `error_code` and `error_message`."""
        return self.rows.filter(pc.field("status") == STATUS_FAILED)


def open_datasets(location: str) -> TableDatasets:
    """Open the captions table in OUT. Of a run that is not finished, only the committed rows are in it.

    Checksums are not compared: that is what `captioner verify` does. Raises OutputError where there is no table.
    """
    table = open_table(location)
    plans = [plan for plan in table.open_plans() if plan.adds_parts]
    committed = set[str]().union(*(table.committed_chunks(plan.generation) for plan in plans))
    published = table.published_parts()
    parts = [captions_name(part) for part in sorted(published)]
    unpublished = [chunk for plan in plans for chunk in plan.chunks() if chunk.part not in published]
    chunks = [table.chunk_name(chunk.chunk_id) for chunk in unpublished if chunk.chunk_id in committed]
    history = [name for name in table.files_with_rows() if name.startswith("history/")]
    return TableDatasets(_dataset(table, parts + chunks), _dataset(table, history))


def _dataset(table: CaptionsTable, names: Sequence[str]) -> Dataset:
    """Return the files as one dataset, whatever their formats."""
    from pyarrow.dataset import dataset  # which imports pandas: too slow for a start that does not need it

    directory = table.directory
    paths = {"parquet": list[str](), "arrow": list[str]()}
    for name in names:
        paths["arrow" if name.endswith(ARROW_SUFFIX) else "parquet"].append(directory.path(name))
    datasets = [
        dataset(paths[format], table.schema, format=format, filesystem=directory.filesystem)
        for format in paths
        if paths[format] or format == "parquet"
    ]
    opened: Dataset = dataset(datasets) if len(datasets) > 1 else datasets[0]
    return opened
