"""Read Parquet, CSV and JSON lines files in batches of a few thousand rows."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from captioner.errors import SourceError
from captioner.sources.columns import REFERENCE_NAMES, Columns, field_of, is_text, with_valid_text
from captioner.sources.plan_rows import BATCH_ROWS
from captioner.sources.root import FETCH_LFS, LFS_POINTER, Root, file_of_unit, is_transient, unit_of_file

LOOK_FOR_CAPTIONS = 1_000_000  # lines of a file whose first ones have no text as captions
SAVE_AS_UTF8 = "save it as UTF-8 (where it is Windows-1252: iconv -f CP1252 -t UTF-8 OLD > NEW)"
TABLE_SUFFIXES = (b".parquet", b".csv", b".tsv", b".jsonl", b".ndjson")


class Table(Protocol):
    """A table in a file."""

    @property
    def schema(self) -> pa.Schema: ...

    def batches(self, columns: Sequence[str], captions: str | None = None) -> Iterator[pa.Table]:
        """Yield these columns of every row, in order, at most BATCH_ROWS rows at a time.

        In the column `captions` what is not a caption may be null.
        """
        ...


def open_table(root: Root, file: bytes, captions: str | None = None) -> Table:
    """Open a table file. `captions`: the column that is asked for captions, if one is.

    Raises SourceError where the file is missing or is not what its suffix says.
    """
    lower = file.lower()
    try:
        if lower.endswith(b".parquet"):
            return ParquetTable(root, file)
        if lower.endswith((b".csv", b".tsv")):
            return CsvTable(root, file)
        return JsonLinesTable(root, file, [captions] if captions else REFERENCE_NAMES)
    except UnicodeDecodeError:  # in the names of columns
        raise UnreadableTableError(_not_utf8(root, file)) from None
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(root, file, error) from None


def read_batches(
    root: Root, file: bytes, table: Table, columns: Sequence[str], captions: str | None = None
) -> Iterator[pa.Table]:
    """Yield `table.batches`.

    Raises SourceError where the file is damaged, where a column of text other than `captions` becomes lists, and where
    two columns have one of these names.
    """
    for name in columns:
        field_of(table.schema, name, "column", root.uri(file))
    try:
        for batch in table.batches(columns, captions):
            for name in columns:
                becomes_list = pa.types.is_list(batch.schema.field(name).type) and pa.types.is_string(
                    table.schema.field(name).type
                )
                if becomes_list and name != captions:
                    raise SourceError(f"{root.uri(file)}: column {name!r} is text in some lines and a list in others")
            yield with_valid_text(batch)
    except UnicodeDecodeError:
        raise UnreadableTableError(_not_utf8(root, file)) from None
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(root, file, error) from None


class UnreadableTableError(SourceError):
    """A table that is missing, refused or damaged, for good."""


def _unreadable(root: Root, file: bytes, error: Exception) -> SourceError:
    if "UTF8" in str(error):
        return UnreadableTableError(_not_utf8(root, file))
    message = f"{root.uri(file)}: cannot be read as a table: {' '.join(str(error).split())}{_hint(root, file)}"
    is_for_good = isinstance(error, pa.ArrowInvalid) or (isinstance(error, OSError) and not is_transient(error))
    return UnreadableTableError(message) if is_for_good else SourceError(message)


def _not_utf8(root: Root, file: bytes) -> str:
    """Return the message for a file with text in another encoding: its first such line, and how to convert it."""
    line = "it "
    with suppress(OSError), root.open(file) as stream:
        line = next((f"line {number} " for number, text in enumerate(stream, start=1) if not _is_utf8(text)), "it ")
    return f"{root.uri(file)}: {line}is not UTF-8 text; {SAVE_AS_UTF8}"


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _hint(root: Root, file: bytes) -> str:
    try:
        is_pointer = root.read(file, 0, len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return ""
    return f"; {FETCH_LFS}" if is_pointer else ""


class ParquetTable:
    """A Parquet file, of which only the requested columns are read."""

    def __init__(self, root: Root, file: bytes) -> None:
        self.file = open_parquet(root, file)
        self.schema: pa.Schema = self.file.schema_arrow

    def batches(self, columns: Sequence[str], captions: str | None = None) -> Iterator[pa.Table]:
        for batch in self.file.iter_batches(BATCH_ROWS, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def open_parquet(root: Root, file: bytes, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file with a buffer: a column of images is read page by page, never a whole row group."""
    return pq.ParquetFile(root.open(file), metadata=footer, buffer_size=1 << 20, pre_buffer=False)


class CsvTable:
    """A CSV file whose columns are all text: an id such as 007 stays as it is.

    Columns may be separated by commas, semicolons or tabs, as spreadsheets of different countries write them.
    """

    def __init__(self, root: Root, file: bytes) -> None:
        self.root, self.file = root, file
        head = root.read(file, 0, 1 << 16)
        self._encoding = encoding_of(head)
        header = head.decode(self._encoding, "replace").partition("\n")[0]
        self._delimiter = "\t" if file.lower().endswith(b".tsv") else max(",;\t", key=header.count)
        with self._open([]) as reader:
            self.schema = pa.schema([(name, pa.string()) for name in reader.schema.names])

    def batches(self, columns: Sequence[str], captions: str | None = None) -> Iterator[pa.Table]:
        with self._open(self.schema.names) as reader:
            for block in reader:
                table = pa.Table.from_batches([block]).select(list(columns))
                yield from (table.slice(start, BATCH_ROWS) for start in range(0, len(table), BATCH_ROWS))

    def _open(self, text_columns: Sequence[str]) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            self.root.open(self.file),
            read_options=pyarrow.csv.ReadOptions(encoding=self._encoding),
            parse_options=pyarrow.csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in text_columns}),
        )


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    values: dict[str, Any]


class JsonLinesTable:
    """A file with a JSON object per line. Its schema is that of the first BATCH_ROWS lines.

    `captions`: columns that may hold captions. Where none of them has text in those lines, later lines are looked at.
    """

    def __init__(self, root: Root, file: bytes, captions: Sequence[str] = REFERENCE_NAMES) -> None:
        self.root, self.file = root, file
        first = list(itertools.islice(self._lines(), BATCH_ROWS))
        names = dict.fromkeys(name for line in first for name in line.values)
        fields = {name: _type_of([line.values.get(name) for line in first]) for name in names}
        has_text = any(name in fields and is_text(fields[name]) for name in captions)
        self.schema = pa.schema(fields if has_text else fields | self._late_captions(captions))

    def _late_captions(self, names: Sequence[str]) -> dict[str, pa.DataType]:
        """Return the column that first has text after the first BATCH_ROWS lines; {} where there is none."""
        keys = [f'"{name}"'.encode() for name in names]
        for number, text in itertools.islice(self._texts(), BATCH_ROWS, LOOK_FOR_CAPTIONS):
            if any(key in text for key in keys):
                values = self._parse(text, number)
                types = {name: _type_of([values[name]]) for name in names if values.get(name) is not None}
                for name, type_ in types.items():
                    if is_text(type_):
                        return {name: type_}
        return {}

    def batches(self, columns: Sequence[str], captions: str | None = None) -> Iterator[pa.Table]:
        lines = self._lines()
        while block := list(itertools.islice(lines, BATCH_ROWS)):
            yield pa.table([self._typed(block, name, name == captions) for name in columns], names=list(columns))

    def _typed(self, block: list[_Line], name: str, is_caption: bool) -> pa.Array:
        values, type_ = [line.values.get(name) for line in block], self.schema.field(name).type
        if is_caption:
            values = [_caption(value, is_text(type_)) for value in values]
        try:
            return _column(values, type_)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            lines = f"lines {block[0].number} to {block[-1].number}"
            raise SourceError(f"{self.root.uri(self.file)}: {lines}, {name!r}: {error}") from None

    def _lines(self) -> Iterator[_Line]:
        for number, text in self._texts():
            if text.strip():
                yield _Line(number, self._parse(text, number))

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the UTF-8 text of each line."""
        with self.root.open(self.file) as stream:
            encoding = encoding_of(stream.read(2))
            stream.seek(0)
            lines: Iterable[bytes] = stream
            if encoding == "utf-16":
                lines = (line.encode() for line in io.TextIOWrapper(stream, encoding))
            yield from enumerate(lines, start=1)

    def _parse(self, text: bytes, number: int) -> dict[str, Any]:
        try:
            values = parse_json(text)
        except UnicodeDecodeError:
            raise UnreadableTableError(_not_utf8(self.root, self.file)) from None
        except ValueError as error:
            raise UnreadableTableError(f"{self.root.uri(self.file)}: line {number} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UnreadableTableError(f"{self.root.uri(self.file)}: line {number} is not a JSON object")
        return values


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text by its first bytes: UTF-16 by its mark, else UTF-8."""
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"


def decode_text(data: bytes) -> str:
    """Return a text of a user without its byte order mark.

    Raises UnicodeDecodeError where it is neither UTF-8 nor UTF-16 with its mark.
    """
    encoding = encoding_of(data)
    return data.decode("utf-8-sig" if encoding == "utf-8" else encoding)


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text, with halves of surrogate pairs, which no UTF-8 may hold, written as numbers.

    Raises ValueError, also where values are nested too deeply, and UnicodeDecodeError where it is no Unicode.
    """
    decoded = text.decode(json.detect_encoding(text))
    try:
        value = json.loads(decoded)
        return _storable(value) if "\\ud" in decoded.lower() else value
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _storable(value: Any) -> Any:
    """Return a JSON value in which halves of surrogate pairs are written as numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "xmlcharrefreplace").decode()
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return {_storable(name): _storable(item) for name, item in value.items()} if isinstance(value, dict) else value


def _caption(value: Any, in_text: bool) -> Any:
    """Return text or a list of text as it is; of anything else None, or what text is in it.

    `in_text`: whether the column is one of text. There an integer becomes text; elsewhere it stays as it is.
    """
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    if type(value) is int:
        return str(value) if in_text else value
    return value if isinstance(value, str) else None


def _column(values: list[Any], type_: pa.DataType | None = None) -> pa.Array:
    """Return an array of `type_`, or of the type that fits.

    Captions that are text in some lines and lists in others all become lists, also where earlier lines had text only;
    ids that are numbers in some lines and text in others become text.
    """
    kinds = {type(value) for value in values if value is not None}
    is_text = type_ is None or pa.types.is_string(type_)
    if is_text and list in kinds and kinds <= {str, list}:
        type_, is_text = None, False
    if list in kinds or (type_ is not None and pa.types.is_list(type_)):
        values = [[value] if isinstance(value, str) else value for value in values]
    if is_text and int in kinds and (type_ is not None or str in kinds) and kinds <= {str, int}:
        values = [value if value is None else str(value) for value in values]
    return pa.array(values, type_)


def _type_of(values: list[Any]) -> pa.DataType:
    """Return the type of a column by its first values; text where they are null or of several types.

    A column of several types is an error only where it is read.
    """
    try:
        type_ = _column(values).type
    except (pa.ArrowException, TypeError, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_null(type_) else type_


@dataclass(frozen=True, slots=True)
class TableFiles:
    """Base of sources that are tables. `files`: paths under the root, in order."""

    name: str
    root: Root
    files: tuple[bytes, ...]
    columns: Columns
    reason: str = ""  # why the source was taken for tables

    def units(self) -> Sequence[str]:
        return [unit_of_file(file) for file in self.files]

    def kept_fields(self) -> list[pa.Field]:
        return list(self.columns.kept)

    def open_unit(self, unit: str) -> tuple[bytes, Table]:
        """Open the table of a unit. Raises SourceError where it cannot be read, or a column is not usable."""
        file = file_of_unit(unit)
        table = open_table(self.root, file, self.columns.reference)
        self.columns.check(table.schema, self.root.uri(file))
        return file, table
