"""Parquet files whose rows hold pictures: bytes, or struct{bytes, path} as Hugging Face writes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.data import Listing, RawImage
from captioner.sources.cells import read_cells
from captioner.sources.columns import Columns, table_rows
from captioner.sources.files import Root, readable
from captioner.sources.reading import with_retry
from captioner.sources.tables import open_parquet, open_table

# Rows of a picture column in memory at once while others of its row group are passed over.
READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """`files`: paths under the root, in order. Each is one unit."""

    name: str
    root: Root
    files: tuple[bytes, ...]
    columns: Columns

    def units(self) -> Sequence[str]:
        return [readable(file.replace(b"%", b"%25")) for file in self.files]

    def kept_fields(self) -> list[pa.Field]:
        return list(self.columns.kept)

    def list_unit(self, unit: str) -> Iterator[Listing]:
        file = unquote_to_bytes(unit)
        first_row = 0
        for batch in open_table(self.root, file).batches(self.columns.described):
            yield Listing(table_rows(batch, self.columns, file, readable(file), first_row), [])
            first_row += batch.num_rows

    def read(self, rows: pa.Table) -> list[RawImage]:
        ...
