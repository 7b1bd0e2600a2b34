"""What is known of one picture: its rows in the captions table and in the alt texts, read when it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captioner.errors import OutputError
from captioner.publishing.alt_text.texts import alt_text_name
from captioner.publishing.review.standing_flags import standing_flags
from captioner.store.directory import Directory
from captioner.store.table import CaptionsTable, captions_name

_COLUMNS = ["image_id", "uri", "width", "height", "num_bytes", "caption", "logprob_mean", "flags"]
_PLACE_COLUMNS = ["chunk_id", "chunk_row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One picture as the reviewer sees it. `chunk_id`, `chunk_row`: where the plan says how to read it."""

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
    """Reads the two row groups it lies in, not the part. Raises OutputError where it is no longer there."""
    captioned = _one_row(table.directory, captions_name(part), row, _COLUMNS + _PLACE_COLUMNS)
    made = _one_row(table.directory, alt_text_name(part), row, ["image_id", "alt_text", "flags"])
    text = made["alt_text"]
    if made["image_id"] != captioned["image_id"] or text is None:
        raise _changed(table.directory)
    flags = standing_flags(captioned["flags"], made["flags"], text)
    return Row(**captioned | {"caption": captioned["caption"] or "", "flags": tuple(flags), "alt_text": text})


def _one_row(directory: Directory, name: str, row: int, columns: list[str]) -> dict[str, Any]:
    try:
        with directory.open_parquet(name) as file:
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row < size:
                    found: dict[str, Any] = file.read_row_group(group, columns).slice(row, 1).to_pylist()[0]
                    return found
                row -= size
    except FileNotFoundError:
        pass
    raise _changed(directory)


def _changed(directory: Directory) -> OutputError:
    return OutputError(f"{directory.location} was changed meanwhile; stop, and start `captioner review` again")
