"""Parquet files with images in their rows: bytes, or struct{bytes, path} as Hugging Face writes them."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.data import Listing, RawImage
from captioner.sources.cells import Cell, make_cell, read_cells
from captioner.sources.columns import UnusableColumnError, table_rows
from captioner.sources.plan_rows import plan_table
from captioner.sources.reading import as_planned, concurrency, with_stamp
from captioner.sources.root import file_of_unit, readable
from captioner.sources.tables import TableFiles, UnreadableTableError, open_parquet, read_batches

# Rows of an image column that are in memory at the same time while the wanted ones of a row group are read.
READ_ROWS = 16
# Row groups that this process keeps open between two reads; each holds up to READ_ROWS images and a page.
MAX_KEPT_READERS = 4


@dataclass(frozen=True, slots=True)
class ParquetSource(TableFiles):
    """Tables that hold the images themselves."""

    def list_unit(self, unit: str) -> Iterator[Listing]:
        """Read the columns of ids, captions and kept values; never that of the images.

        One of several tables that is damaged or refused, or whose columns are not those of the others, is a single row
        that will fail, or one after its good rows.
        """
        file, first_row = file_of_unit(unit), 0
        stamp = self.root.stamp(file)
        try:
            _, table = self.open_unit(unit)
            for batch in read_batches(self.root, file, table, self.columns.described, self.columns.reference):
                rows = table_rows(batch, self.columns, file, readable(file), first_row)
                yield Listing(with_stamp(rows, stamp), [])
                first_row += batch.num_rows
            if not first_row:
                rows = plan_table([], [], kept=pa.schema(self.columns.kept).empty_table())
                yield Listing(with_stamp(rows, stamp), [], [f"{readable(file)}: an empty table: it has no row"])
        except (UnreadableTableError, UnusableColumnError) as error:
            if len(self.files) == 1:
                raise
            yield Listing(with_stamp(self._damaged_row(file, first_row), stamp), [], [str(error)])

    def _damaged_row(self, file: bytes, first_row: int) -> pa.Table:
        """Return what stands in the plan for the rows that cannot be listed: a row that fails, with a negative size."""
        image_id = f"{readable(file)}/[damaged from row {first_row}]"
        kept = pa.schema(self.columns.kept)
        nulls = pa.Table.from_arrays([pa.nulls(1, field.type) for field in kept], schema=kept)
        return plan_table([image_id], [file], size=[-1], row=[first_row], kept=nulls)

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Read the image column of the row groups that hold these rows."""
        locations = list(zip(rows.column("file").to_pylist(), rows.column("row").to_pylist(), strict=True))
        is_damage = [size is not None for size in rows.column("size").to_pylist()]
        rows_of: dict[bytes, list[int]] = defaultdict(list)
        for (file, row), damage in zip(locations, is_damage, strict=True):
            if not damage:
                rows_of[file].append(row)
        cells: dict[tuple[bytes, int], Cell] = {}
        with ThreadPoolExecutor(concurrency()) as pool:
            groups = [group for of_file in pool.map(self._groups, rows_of, rows_of.values()) for group in of_file]
            for group, group_cells in zip(groups, pool.map(self._read_group, groups), strict=True):
                cells |= {(group.file, row): cell for row, cell in group_cells.items()}
        uris = [f"{self.root.uri(file)}#{row}" for file, row in locations]
        images = read_cells(rows, [cells.get(location) for location in locations], uris, self.root)
        images = [_damaged(image) if damage else image for image, damage in zip(images, is_damage, strict=True)]
        return as_planned(images, rows, self.root)

    def _groups(self, file: bytes, rows: Sequence[int]) -> list[_Group]:
        """Return the row groups of a file that hold these rows."""
        try:
            footer = self.root.retry(lambda: open_parquet(self.root, file).metadata)
        except (OSError, pa.ArrowException) as error:
            return [_Group(file, 0, 0, frozenset(rows), _as_os_error(error))]
        starts = np.cumsum([0, *(footer.row_group(index).num_rows for index in range(footer.num_row_groups))])
        wanted: dict[int, set[int]] = defaultdict(set)
        for row in rows:
            if row < footer.num_rows:
                wanted[int(np.searchsorted(starts, row, side="right")) - 1].add(row)
        return [
            _Group(file, index, int(starts[index]), frozenset(group_rows), footer)
            for index, group_rows in wanted.items()
        ]

    def _read_group(self, group: _Group) -> dict[int, Cell]:
        """Return the wanted cells by row. A row group that cannot be read fails alone."""
        if isinstance(group.footer, OSError):
            return dict.fromkeys(group.wanted, group.footer)
        try:
            return self.root.retry(lambda: self._scan_group(group))
        except (OSError, pa.ArrowException) as error:
            return dict.fromkeys(group.wanted, _as_os_error(error))

    def _scan_group(self, group: _Group) -> dict[int, Cell]:
        """Return the wanted cells, read on from where an earlier read of the row group ended, if it is before them."""
        assert not isinstance(group.footer, OSError)
        column = self.columns.image
        key = (self.root.location, group.file, group.index, column, self.root.stamp(group.file))
        reader = _kept_readers.take(key, min(group.wanted))
        if reader is None:
            table = open_parquet(self.root, group.file, group.footer)
            end = group.start + group.footer.row_group(group.index).num_rows
            reader = _GroupReader(table, group.index, column, group.start, end)
        try:
            cells = dict(reader.read(group.wanted, os.path.dirname(group.file)))
        except BaseException:
            reader.close()
            raise
        _kept_readers.keep(key, reader)
        return cells


class _GroupReader:
    """Reads a column of one row group from its first row on, a few rows at a time: the group may not fit into memory.

    `position`: the row that is read next.
    """

    def __init__(self, table: pq.ParquetFile, index: int, column: str, start: int, end: int) -> None:
        self._table, self.position, self._end = table, start, end
        self._batches = table.iter_batches(READ_ROWS, row_groups=[index], columns=[column])
        self._left = pa.nulls(0)  # rows of a batch, from `position` on

    @property
    def is_at_end(self) -> bool:
        return self.position >= self._end

    def read(self, wanted: frozenset[int], folder: bytes) -> Iterator[tuple[int, Cell]]:
        """Yield the wanted cells by row; none is before `position`. Stops after the last one."""
        last = max(wanted)
        while self.position <= last and not self.is_at_end:
            if not len(self._left):
                batch = next(self._batches)
                if not batch.num_columns:  # the file was rewritten after it was planned
                    raise pa.ArrowInvalid("the column of images is gone")
                self._left = batch.column(0)
            taken = min(len(self._left), last + 1 - self.position)
            for offset in range(taken):
                if self.position + offset in wanted:
                    yield self.position + offset, make_cell(self._left[offset].as_py(), folder)
            self._left = self._left.slice(taken)
            self.position += taken

    def close(self) -> None:
        self._table.close(force=True)


class _KeptReaders:
    """The readers that a later read in this process may go on with, so that a row group is not read once per chunk."""

    def __init__(self) -> None:
        self._readers: list[tuple[object, _GroupReader]] = []
        self._lock = threading.Lock()

    def take(self, key: object, first: int) -> _GroupReader | None:
        """Remove and return the reader of a row group that is the nearest before row `first`."""
        with self._lock:
            usable = [item for item in self._readers if item[0] == key and item[1].position <= first]
            if not usable:
                return None
            nearest = max(usable, key=lambda item: item[1].position)
            self._readers.remove(nearest)
            return nearest[1]

    def keep(self, key: object, reader: _GroupReader) -> None:
        if reader.is_at_end:
            reader.close()
            return
        with self._lock:
            self._readers.append((key, reader))
            oldest = self._readers.pop(0)[1] if len(self._readers) > MAX_KEPT_READERS else None
        if oldest:
            oldest.close()


_kept_readers = _KeptReaders()


def _damaged(image: RawImage) -> RawImage:
    message = (
        "the table is damaged, could not be opened or has other columns: its rows from here on could not be listed"
    )
    return replace(image, data=None, error_code="damaged", error_message=message)


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows to read of one row group. `start`: its first row; `footer`: of the file, or why there is none."""

    file: bytes
    index: int
    start: int
    wanted: frozenset[int]
    footer: pq.FileMetaData | OSError


def _as_os_error(error: Exception) -> OSError:
    """Return an OSError for damage that pyarrow reports in other ways; EBADMSG is the system's number for it."""
    return error if isinstance(error, OSError) else OSError(errno.EBADMSG, " ".join(str(error).split()))
