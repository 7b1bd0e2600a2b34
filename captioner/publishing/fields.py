"""A column of the captions table as text: what `--field` names for alt texts and exports."""

from __future__ import annotations

import difflib
from typing import Any

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


def is_from_source(table: CaptionsTable, name: str) -> bool:
    """Return whether the texts of a column are those that the images came with, not a model's."""
    return name != CAPTION_FIELD and all(name != field.name for field in table.answer_fields)


def texts_of(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of `rows` as text; null where an image has none: no value, only white space, or not a number.

    The values of a list are joined by commas. An empty caption stays an empty text: the model answered so, and a
    reviewer writes another.
    """
    column = rows[name]
    if name == CAPTION_FIELD:
        return column
    return pa.chunked_array([_joined(column) if _is_list(column.type) else _texts(column).combine_chunks()])


def _joined(lists: pa.ChunkedArray) -> pa.Array:
    """Return the values of each list that have a text, joined by commas; null where none has."""
    whole = lists.combine_chunks()
    texts_of_lists: list[list[str]] = [[] for _ in range(len(whole))]
    for index, text in zip(pc.list_parent_indices(whole).to_pylist(), _texts(whole.flatten()).to_pylist(), strict=True):
        if text is not None:
            texts_of_lists[index].append(text)
    return pa.array([", ".join(texts) or None for texts in texts_of_lists], pa.string())


def _texts(values: pa.Array | pa.ChunkedArray) -> Any:
    texts = pc.cast(values, pa.string())
    no_text = pc.equal(pc.utf8_trim_whitespace(texts), "")
    if pa.types.is_floating(values.type):
        no_text = pc.or_(no_text, pc.is_nan(values))
    return pc.if_else(no_text, None, texts)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.value_type if _is_list(kind) else kind
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return bool(is_number or types.is_string(kind) or types.is_large_string(kind))
