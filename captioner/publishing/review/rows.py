"""Read the data of one image from the captions table and the alt texts when it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captioner.errors import DamagedFileError, OutputError
from captioner.publishing.alt_text.texts import alt_text_name
from captioner.publishing.review.standing_flags import standing_flags
from captioner.store.directory import Directory
from captioner.store.table import CaptionsTable, captions_name

_COLUMNS = ["image_id", "uri", "width", "height", "num_bytes", "caption", "logprob_mean", "flags"]
_PLAN_COLUMNS = ["chunk_id", "chunk_row"]


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


def read_row(table: CaptionsTable, part: int, row: int) -> Row:
    """Read one row, loading only its row groups. Raises OutputError when it no longer exists."""
    caption_row = _read_row_of(table.directory, captions_name(part), row, _COLUMNS + _PLAN_COLUMNS)
    alt_text_row = _read_row_of(table.directory, alt_text_name(part), row, ["image_id", "alt_text", "flags"])
    text = alt_text_row["alt_text"]
    if alt_text_row["image_id"] != caption_row["image_id"] or text is None:
        raise _changed(table.directory)
    flags = standing_flags(caption_row["flags"], alt_text_row["flags"], text)
    return Row(**caption_row | {"caption": caption_row["caption"] or "", "flags": tuple(flags), "alt_text": text})


def _read_row_of(directory: Directory, name: str, row: int, columns: list[str]) -> dict[str, Any]:
    try:
        with directory.open_parquet(name) as file:
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row < size:
                    values: dict[str, Any] = file.read_row_group(group, columns).slice(row, 1).to_pylist()[0]
                    return values
                row -= size
    except DamagedFileError:
        pass
    raise _changed(directory)


def _changed(directory: Directory) -> OutputError:
    return OutputError(f"{directory.location} was changed during the review; start `captioner review` again")
