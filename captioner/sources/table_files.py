"""What manifests and Parquet archives share: tables with a row for each picture, each table a unit of the listing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from captioner.sources.columns import Columns
from captioner.sources.files import Root, file_of_unit, unit_of_file
from captioner.sources.tables import Table, open_table


@dataclass(frozen=True, slots=True)
class TableFiles:
    """`files`: the tables, as paths under the root, in order."""

    name: str
    root: Root
    files: tuple[bytes, ...]
    columns: Columns

    def units(self) -> Sequence[str]:
        return [unit_of_file(file) for file in self.files]

    def kept_fields(self) -> list[pa.Field]:
        return list(self.columns.kept)

    def open_unit(self, unit: str) -> tuple[bytes, Table]:
        """Raises SourceError where it is no such table, or lacks a column."""
        file = file_of_unit(unit)
        table = open_table(self.root, file)
        self.columns.check(table.schema, self.root.uri(file))
        return file, table
