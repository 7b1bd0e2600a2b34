"""A manifest: a CSV, JSON lines or Parquet table with a path or URI for each image.

In JSON lines it may be a struct{bytes, path} without bytes, as `datasets` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from captioner.data import Listing, RawImage
from captioner.errors import SourceError
from captioner.sources.columns import has_sha256, table_rows
from captioner.sources.copies import read_copies_once, with_known_sha256
from captioner.sources.root import FETCH_FIRST, file_named_in, readable
from captioner.sources.tables import TableFiles, read_batches


@dataclass(frozen=True, slots=True)
class ManifestSource(TableFiles):
    """A table whose paths are relative to its own folder. The plan holds full paths, so reading needs no table."""

    def list_unit(self, unit: str) -> Iterator[Listing]:
        file, table = self.open_unit(unit)
        first_row = 0
        sha256 = self.columns.sha256 if has_sha256(table.schema) else None
        names = list(dict.fromkeys([*self.columns.described, self.columns.image, *filter(None, [sha256])]))
        for batch in read_batches(self.root, file, table, names, self.columns.reference):
            rows = table_rows(batch, self.columns, file, readable(file), first_row)
            paths = [self._full_path(file, path) for path in batch.column(self.columns.image).to_pylist()]
            rows = rows.set_column(1, rows.schema.field("file"), [pa.array(paths, pa.binary())])
            rows = rows.set_column(4, rows.schema.field("row"), [pa.nulls(len(rows), pa.int64())])
            if self.columns.sha256:
                rows = with_known_sha256(rows, batch.column(sha256).to_pylist() if sha256 else [None] * len(batch))
            yield Listing(rows, [])
            first_row += batch.num_rows

    def read(self, rows: pa.Table) -> list[RawImage]:
        return read_copies_once(rows, self.root)

    def _full_path(self, table: bytes, cell: str | dict[str, str | None] | None) -> bytes:
        """Return the full path, or b"" where the table names no file: that row fails as not found."""
        if isinstance(cell, dict) and cell.get("bytes") is not None:
            raise SourceError(f"{self.root.uri(table)}: images in text are not read; save the table as Parquet")
        path = cell.get("path") if isinstance(cell, dict) else cell
        if not path:
            return b""
        if path.lower().startswith(("http://", "https://")):
            raise SourceError(f"{self.root.uri(table)}: it names {path}; {FETCH_FIRST}")
        folder = os.path.dirname(table)
        file = self.root.join(file_named_in(folder, path))
        if "\\" in path and "/" not in path and not self.root.exists(file):  # written on Windows
            return self.root.join(file_named_in(folder, path.replace("\\", "/")))
        return file
