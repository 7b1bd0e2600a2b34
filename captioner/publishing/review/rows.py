"""Read the data of images from the captions table and the alt texts when they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.console.text import printable, shorten
from captioner.errors import DamagedFileError, OutputError
from captioner.publishing.alt_text.texts import alt_text_name
from captioner.publishing.review.standing_flags import standing_flags
from captioner.store.directory import Directory
from captioner.store.table import CaptionsTable, captions_name

_COLUMNS = ["image_id", "uri", "sha256", "width", "height", "num_bytes", "caption", "logprob_mean", "flags"]
_PLAN_COLUMNS = ["chunk_id", "chunk_row"]
_MAX_TEXT = 1_000  # characters of a catalogue's column


@dataclass(frozen=True, slots=True)
class Row:
    """One image as the reviewer sees it. `chunk_id`, `chunk_row`: its row in the plan, which says how to read it."""

    image_id: str
    uri: str
    width: int | None
    height: int | None
    num_bytes: int | None
    caption: str
    logprob_mean: float | None
    flags: tuple[str, ...]
    chunk_id: str
    chunk_row: int
    alt_text: str
    sha256: str | None = None


def read_rows(table: CaptionsTable, locations: Sequence[tuple[int, int]]) -> list[Row]:
    """Read rows, given as (part, row of the part), loading only their row groups.

    Raises OutputError when one of them no longer exists.
    """
    captions = _read(table.directory, captions_name, locations, _COLUMNS + _PLAN_COLUMNS)
    alt_texts = _read(table.directory, alt_text_name, locations, ["image_id", "alt_text", "flags"])
    return [_row(table.directory, captions[location], alt_texts[location]) for location in locations]


@dataclass(frozen=True, slots=True)
class FailedRow:
    """An image without a caption. `code`, `message`: its error_code and error_message."""

    row: Row
    code: str
    message: str


def read_failed(table: CaptionsTable, locations: Sequence[tuple[int, int]]) -> list[FailedRow]:
    """Read rows without a caption, given as for `read_rows`. Raises OutputError when one of them no longer exists."""
    columns = [*_COLUMNS, *_PLAN_COLUMNS, "error_code", "error_message"]
    rows = _read(table.directory, captions_name, locations, columns)
    return [_failed_row(rows[location]) for location in locations]


def _failed_row(values: dict[str, Any]) -> FailedRow:
    code, message = values.pop("error_code") or "", values.pop("error_message") or ""
    row = Row(**values | {"caption": "", "flags": (), "alt_text": ""})
    return FailedRow(row, code, message)


def read_catalogue(table: CaptionsTable, part: int, row: int) -> dict[str, str]:
    """Return the columns of one image that are kept from the source (title, tags, ...), as texts; none is empty."""
    columns = [field.name for field in table.kept_fields if not _holds_bytes(field.type)]
    if not columns:
        return {}
    values = _read(table.directory, captions_name, [(part, row)], columns)[part, row]
    texts = {name: _as_text(value) for name, value in values.items()}
    return {name: shorten(text, _MAX_TEXT) for name, text in texts.items() if text}


def _row(directory: Directory, caption_row: dict[str, Any], alt_text_row: dict[str, Any]) -> Row:
    text = alt_text_row["alt_text"]
    if alt_text_row["image_id"] != caption_row["image_id"] or text is None:
        raise _changed(directory)
    flags = standing_flags(caption_row["flags"], alt_text_row["flags"], text)
    return Row(**caption_row | {"caption": caption_row["caption"] or "", "flags": tuple(flags), "alt_text": text})


def _read(
    directory: Directory, name_of: Callable[[int], str], locations: Sequence[tuple[int, int]], columns: list[str]
) -> dict[tuple[int, int], dict[str, Any]]:
    """Return these columns of rows, by location. `name_of`: the file name of a part."""
    rows_of: dict[int, list[int]] = {}
    for part, row in locations:
        rows_of.setdefault(part, []).append(row)
    try:
        return {
            (part, row): values
            for part, rows in rows_of.items()
            for row, values in _read_rows_of(directory, name_of(part), set(rows), columns)
        }
    except (DamagedFileError, IndexError):
        raise _changed(directory) from None


def _read_rows_of(
    directory: Directory, name: str, rows: set[int], columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a file with their indices. Raises IndexError where it has fewer rows."""
    with directory.open_parquet(name, columns) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            inside = sorted(row for row in rows if first <= row < end)
            if inside:
                values = file.read_row_group(group, columns).take([row - first for row in inside]).to_pylist()
                yield from zip(inside, values, strict=True)
            first = end
        if max(rows) >= first:
            raise IndexError(name)


def _holds_bytes(type_: pa.DataType) -> bool:
    return "binary" in str(type_)  # also within lists and structs


def _as_text(value: Any) -> str:
    """Return a value of any column as a line for people: lists with commas, "" for nothing."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_as_text, value)))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text}" for name, text in ((key, _as_text(value[key])) for key in value) if text)
    return "" if value is None else printable(value).strip()


def _changed(directory: Directory) -> OutputError:
    return OutputError(f"{directory.location} was changed during the review; start `captioner review` again")
