"""A column of the captions table as text: what `--field` names for alt texts and exports."""

from __future__ import annotations

import difflib

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import SAMPLES_FIELD
from captioner.errors import UsageError
from captioner.store.table import CaptionsTable

CAPTION_FIELD = "caption"


def check_field(table: CaptionsTable, name: str) -> None:
    """Raise UsageError where the table has no column of this name, or one that holds no text."""
    schema = table.schema
    if name not in schema.names:
        near = difflib.get_close_matches(name, schema.names, n=1)
        others = [other for other in schema.names if _is_text(schema.field(other).type)]
        hint = f"did you mean {near[0]}?" if near else f"columns of text are {', '.join(others)}"
        raise UsageError(f"--field {name}: the table has no such column; {hint}")
    if name == SAMPLES_FIELD.name:
        raise UsageError(f"--field {name}: holds several captions of each image; {CAPTION_FIELD} is the first of them")
    if not _is_text(schema.field(name).type):
        raise UsageError(f"--field {name}: holds {schema.field(name).type}, which is not text; name another column")


def texts_of(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of `rows` as text; null where an image has none. Lists are joined by commas.

    An empty caption stays an empty text: the model answered so, and a reviewer writes another.
    """
    column = rows[name]
    if name == CAPTION_FIELD:
        return column
    if _is_list(column.type):
        column = pc.binary_join(pc.cast(column, pa.list_(pa.string())), ", ")
    texts = pc.cast(column, pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), None, texts)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.value_type if _is_list(kind) else kind
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return bool(is_number or types.is_string(kind) or types.is_large_string(kind))
