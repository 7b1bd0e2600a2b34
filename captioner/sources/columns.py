"""Find the columns of a table with image, id and captions, and convert its rows to rows of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from captioner.config import SourceConfig
from captioner.data import CAPTIONS_SCHEMA, PLAN_SCHEMA
from captioner.errors import SourceError
from captioner.sources.plan_rows import plan_table
from captioner.sources.root import FETCH_FIRST, readable

REFERENCE_NAMES = ("captions", "caption", "text")
IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes", "bytes", "content")
PATH_NAMES = ("path", "uri", "file_name", "filename", "file", "image_path", "file_path", "filepath", "image_uri")
ACCEPTED = "accepted are binary, struct{bytes, path}, and strings that are paths or URIs"

CellKind = Literal["bytes", "struct", "path"]


class UnusableColumnError(SourceError):
    """A table that lacks a column which was asked for or which others have, or has it twice or in another type."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table that are used. `sha256`: of the images' files, where the table has it."""

    image: str
    kind: CellKind
    id: str | None
    reference: str | None
    kept: tuple[pa.Field, ...]
    sha256: str | None = None

    @property
    def described(self) -> list[str]:
        """The columns that a listing reads: all but the image."""
        names = [self.id, self.reference, *(field.name for field in self.kept)]
        return list(dict.fromkeys(name for name in names if name))

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raise UnusableColumnError where another table of the source lacks one of these columns, or has other values.

        A column of nulls may have no type. Kept values are compared where they are read.
        """
        for name in (self.image, *self.described):
            field_of(schema, name, "column", where)
        image = schema.field(self.image).type
        kind = cell_kind(image)
        if not types.is_null(image) and (kind is None or (self.kind == "path" and kind != "path")):
            first = "paths" if self.kind == "path" else "images"
            raise UnusableColumnError(f"{where}: column {self.image!r} is {image}; in another table it holds {first}")
        if self.id is not None:
            _id_column(schema, self.id, where)
        if self.reference is not None and not types.is_null(schema.field(self.reference).type):
            reference_column_of(schema, self.reference, where)


def choose_columns(schema: pa.Schema, config: SourceConfig, where: str) -> Columns:
    """Return the columns that the flags name, or else those recognised by name and type.

    Without `--id-column` a column `image_id` is the id. Raises SourceError naming column, type and what is accepted.
    """
    image = config.image_column or _find_image(schema, where)
    kind = cell_kind(field_of(schema, image, "--image-column", where).type)
    if kind is None:
        raise SourceError(f"{where}: column {image!r} is {schema.field(image).type}; {ACCEPTED}")
    return Columns(
        image=image,
        kind=kind,
        id=_id_column(schema, config.id_column, where),
        reference=reference_column_of(schema, config.reference_column, where),
        kept=tuple(_kept_field(schema, name, where) for name in config.keep_columns),
        sha256="sha256" if has_sha256(schema) else None,
    )


def untyped_columns(schema: pa.Schema, config: SourceConfig) -> list[str]:
    """Return the columns that `choose_columns` may take, apart from images, and that hold only nulls in this table."""
    captions = [config.reference_column] if config.reference_column else REFERENCE_NAMES
    names = {config.id_column or "image_id", *captions, *config.keep_columns}
    return [field.name for field in schema if field.name in names and types.is_null(field.type)]


def has_sha256(schema: pa.Schema) -> bool:
    """Return whether there is a column `sha256` of text."""
    return bool(schema.names.count("sha256") == 1 and _is_string(schema.field("sha256").type))


def cell_kind(type_: pa.DataType) -> CellKind | None:
    """Return what an image column of that type holds; None where it cannot hold images."""
    if _is_binary(type_):
        return "bytes"
    if _is_string(type_) or _is_string_dictionary(type_):
        return "path"
    if types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        if _is_binary(fields.get("bytes", pa.null())) or _is_string(fields.get("path", pa.null())):
            return "struct"
    return None


def reference_column_of(schema: pa.Schema, name: str | None, where: str) -> str | None:
    """Return the column of reference captions: text, or lists of text."""
    if name is None:
        present = [column for column in REFERENCE_NAMES if column in schema.names]
        return next((name for name in present if is_text(field_of(schema, name, "column", where).type)), None)
    type_ = field_of(schema, name, "--reference-column", where).type
    if not is_text(type_):
        raise UnusableColumnError(f"{where}: column {name!r} is {type_}; captions are strings or lists of strings")
    return name


def references_of(batch: pa.Table, column: str | None) -> pa.Array:
    """Return the reference captions, list<string> [rows]; null where there are none."""
    if column is None:
        return pa.nulls(len(batch), pa.list_(pa.string()))
    return pa.array(map(as_captions, batch.column(column).to_pylist()), pa.list_(pa.string()))


def as_captions(value: Any) -> list[str] | None:
    """Return a caption, or a list of captions, as a list without empty ones; None where none is left."""
    values = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in values if isinstance(text, str)]
    return [text for text in captions if text] or None


def table_rows(batch: pa.Table, columns: Columns, file: bytes, label: str, first_row: int) -> pa.Table:
    """Return the plan rows of a batch that starts at row `first_row` of `file`. `label`: its name in generated ids."""
    rows = pa.array(range(first_row, first_row + len(batch)), pa.int64())
    return plan_table(
        ids_of(batch, columns, label, rows),
        [file] * len(batch),
        row=rows,
        references=references_of(batch, columns.reference),
        kept=_kept_of(batch, columns.kept, label),
    )


def _kept_of(batch: pa.Table, fields: Sequence[pa.Field], label: str) -> pa.Table:
    """Return the kept columns in the types of `fields`. Raises UnusableColumnError where values do not fit them."""
    columns = []
    for field in fields:
        column = batch.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            here = f"{label}: column {field.name!r} is {column.type}"
            raise UnusableColumnError(f"{here}, in another table {field.type}: {reason}") from None
    return pa.table(columns, schema=pa.schema(fields))


def ids_of(batch: pa.Table, columns: Columns, label: str, rows: Iterable[Any]) -> pa.Array:
    """Return the id column as text; `<label>#<row>` where there is none or it is null."""
    generated = pa.array((f"{label}#{row}" for row in rows), pa.string())
    if columns.id is None:
        return generated
    column = batch.column(columns.id)
    if _is_uuid(column.type):  # a cast would give its 16 bytes
        column = pa.chunked_array(
            [[None if value is None else str(value) for value in column.to_pylist()]], pa.string()
        )
    return pc.coalesce(column.cast(pa.string()).combine_chunks(), generated)


def with_valid_text(batch: pa.Table) -> pa.Table:
    """Return the batch with text that is not UTF-8, which Parquet files may hold, as `readable` writes it."""
    for index, column in enumerate(batch.columns):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            batch = batch.set_column(index, batch.schema.field(index), _as_valid_text(column))
    return batch


def _as_valid_text(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of text, or of lists of text, as UTF-8; null where it holds anything else."""
    if not is_text(column.type):
        return pa.nulls(len(column), column.type)
    is_list = not _is_string(column.type) and not _is_string_dictionary(column.type)
    as_bytes = pa.large_list(pa.large_binary()) if is_list else pa.large_binary()
    return pa.array([_readable(value) for value in column.cast(as_bytes).to_pylist()], column.type)


def _readable(value: bytes | list[bytes | None] | None) -> Any:
    if isinstance(value, list):
        return [_readable(text) for text in value]
    return None if value is None else readable(value)


def _find_image(schema: pa.Schema, where: str) -> str:
    """Find the image column: bytes before paths, known names before others; a path column only by its name."""
    kinds = {field.name: cell_kind(field.type) for field in schema}
    holders = [name for name, kind in kinds.items() if kind in ("bytes", "struct")]
    bytes_column = _first_match(holders, IMAGE_NAMES) or (holders[0] if len(holders) == 1 else None)
    if bytes_column:
        return bytes_column
    if holders:
        raise SourceError(f"{where}: images may be in {_listed(holders)}; choose with --image-column")
    paths = [name for name, kind in kinds.items() if kind == "path"]
    path_column = _first_match(paths, PATH_NAMES + IMAGE_NAMES)
    if path_column:
        return path_column
    if any(name.lower() in ("url", "image_url") for name in paths):
        raise SourceError(f"{where}: {FETCH_FIRST}")
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise SourceError(f"{where}: no column of images among {columns}; {ACCEPTED}: choose with --image-column")


def _first_match(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def field_of(schema: pa.Schema, name: str, flag: str, where: str) -> pa.Field:
    """Return the one column of a name. Raises UnusableColumnError; `flag`: what named it."""
    if schema.names.count(name) > 1:
        raise UnusableColumnError(f"{where}: several columns are called {name!r}; rename all but one")
    if name not in schema.names:
        raise UnusableColumnError(f"{where}: {flag} {name!r}: no such column; it has: {', '.join(schema.names)}")
    return schema.field(name)


def _id_column(schema: pa.Schema, name: str | None, where: str) -> str | None:
    if name is None:
        if "image_id" not in schema.names:
            return None
        name = "image_id"
    type_ = field_of(schema, name, "--id-column", where).type
    if not _is_id(type_):
        raise UnusableColumnError(
            f"{where}: column {name!r} is {type_}; ids are strings or integers: convert it, or choose with --id-column"
        )
    return name


def _kept_field(schema: pa.Schema, name: str, where: str) -> pa.Field:
    kept = field_of(schema, name, "--keep-columns", where)
    if name in CAPTIONS_SCHEMA.names or name in PLAN_SCHEMA.names:
        raise SourceError(f"{where}: --keep-columns {name!r}: the captions table already has a column of that name")
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}  # which the captions table does not hold
    return pa.field(name, views.get(kept.type, kept.type))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_binary(type_: pa.DataType) -> bool:
    return bool(types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_))


def _is_string(type_: pa.DataType) -> bool:
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def is_text(type_: pa.DataType) -> bool:
    is_list = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    return _is_string(type_.value_type if is_list or types.is_dictionary(type_) else type_)


def _is_string_dictionary(type_: pa.DataType) -> bool:
    """Return whether it is what pandas and Polars write of categories that are text."""
    return bool(types.is_dictionary(type_) and _is_string(type_.value_type))


def _is_uuid(type_: pa.DataType) -> bool:
    return getattr(type_, "extension_name", None) == "arrow.uuid"


def _is_id(type_: pa.DataType) -> bool:
    is_text = _is_string(type_) or _is_string_dictionary(type_) or _is_uuid(type_)
    return bool(is_text or types.is_integer(type_) or types.is_null(type_))
