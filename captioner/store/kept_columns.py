"""Kept columns (--keep-columns) in the types that they have in OUT: those that SOURCE gave them when OUT was made."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import types

from captioner.errors import OutputError
from captioner.store.table import CaptionsTable


def with_kept_types(table: CaptionsTable, rows: pa.Table) -> pa.Table:
    """Return listed rows with the kept columns in the types of the table, in which no value may differ.

    Raises OutputError where that cannot be.
    """
    for field in table.kept_fields:
        column = rows[field.name]
        if column.type == field.type:
            continue
        same_values = _cast(column, field.type)
        if same_values is None:
            raise OutputError(
                f"column {field.name!r} is {field.type} in {table.directory.location}, and {column.type} in SOURCE "
                "now; give the column its former type, another OUT, or --overwrite"
            )
        rows = rows.set_column(rows.schema.get_field_index(field.name), field, same_values)
    return rows


def _cast(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray | None:
    """Return a column in another type; None where a value would not come back as it was, such as "007" as a number."""
    try:
        cast = column.cast(type_)
        if types.is_null(column.type):
            return cast
        back = cast.cast(column.type)
    except pa.ArrowException:
        return None
    return cast if repr(back.to_pylist()) == repr(column.to_pylist()) else None  # a NaN does not equal itself
