"""Parquet files whose rows hold images: bytes, or struct{bytes, path} as Hugging Face writes them."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.data import Listing, RawImage
from captioner.sources.cells import Cell, make_cell, read_cells
from captioner.sources.columns import table_rows
from captioner.sources.reading import concurrency, with_retry
from captioner.sources.root import readable
from captioner.sources.tables import TableFiles, open_parquet, read_batches

# Rows of an image column in memory at once, while the wanted ones of its row group are looked for.
READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class ParquetSource(TableFiles):
    """The images are in the tables themselves."""

    def list_unit(self, unit: str) -> Iterator[Listing]:
        """Reads the columns of ids, captions and kept values; never that of the images."""
        file, table = self.open_unit(unit)
        first_row = 0
        for batch in read_batches(self.root, file, table, self.columns.described):
            yield Listing(table_rows(batch, self.columns, file, readable(file), first_row), [])
            first_row += batch.num_rows

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Only the row groups that hold these rows, and only the image column."""
        places = list(zip(rows.column("file").to_pylist(), rows.column("row").to_pylist(), strict=True))
        numbers: dict[bytes, list[int]] = defaultdict(list)
        for file, number in places:
            numbers[file].append(number)
        cells: dict[tuple[bytes, int], Cell] = {}
        with ThreadPoolExecutor(concurrency()) as pool:
            groups = [group for found in pool.map(self._groups, numbers, numbers.values()) for group in found]
            for group, found in zip(groups, pool.map(self._read_group, groups), strict=True):
                cells |= {(group.file, number): cell for number, cell in found.items()}
        uris = [f"{self.root.uri(file)}#{number}" for file, number in places]
        return read_cells(rows, [cells.get(place) for place in places], uris, self.root)

    def _groups(self, file: bytes, numbers: Sequence[int]) -> list[_Group]:
        """The row groups of a file that hold these rows."""
        try:
            footer = with_retry(lambda: open_parquet(self.root, file).metadata)
        except (OSError, pa.ArrowException) as error:
            return [_Group(file, 0, 0, frozenset(numbers), _as_os_error(error))]
        starts = np.cumsum([0, *(footer.row_group(index).num_rows for index in range(footer.num_row_groups))])
        wanted: dict[int, set[int]] = defaultdict(set)
        for number in numbers:
            if number < footer.num_rows:
                wanted[int(np.searchsorted(starts, number, side="right")) - 1].add(number)
        return [_Group(file, index, int(starts[index]), frozenset(rows), footer) for index, rows in wanted.items()]

    def _read_group(self, group: _Group) -> dict[int, Cell]:
        """The wanted cells by row number. What cannot be read fails alone."""
        if isinstance(group.footer, OSError):
            return dict.fromkeys(group.wanted, group.footer)
        try:
            return with_retry(lambda: dict(self._scan_group(group)))
        except (OSError, pa.ArrowException) as error:
            return dict.fromkeys(group.wanted, _as_os_error(error))

    def _scan_group(self, group: _Group) -> Iterator[tuple[int, Cell]]:
        """Batch by batch, up to the last wanted row: a row group of large images may be more than memory holds."""
        start, last, folder = group.start, max(group.wanted), os.path.dirname(group.file)
        with open_parquet(self.root, group.file, group.footer) as table:
            for batch in table.iter_batches(READ_ROWS, row_groups=[group.index], columns=[self.columns.image]):
                for number in range(start, start + len(batch)):
                    if number in group.wanted:
                        yield number, make_cell(batch.column(0)[number - start].as_py(), folder)
                start += len(batch)
                if start > last:
                    return


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows wanted of one row group. `start`: its first row's number; `footer`: of the file, or why there is none."""

    file: bytes
    index: int
    start: int
    wanted: frozenset[int]
    footer: pq.FileMetaData | OSError


def _as_os_error(error: Exception) -> OSError:
    """pyarrow finds damage in many ways; EBADMSG is the system's number for it."""
    return error if isinstance(error, OSError) else OSError(errno.EBADMSG, " ".join(str(error).split()))
