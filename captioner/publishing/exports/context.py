"""The context that every `write` function gets besides the texts, and the lines that several formats write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.publishing.exports.originals import Originals
from captioner.publishing.exports.select import AS_THEY_ARE, Tally, Wording, provenance


@dataclass(frozen=True)
class Export:
    """Everything a `write` function needs besides the texts.

    `dest` is a path that may be written; for the hub, its repository. `unselected` returns the texts that are not
    exported, so that an update can remove them from an earlier export. `record` describes the export and is kept in its
    folder. `wording` is what was added to the texts.
    """

    dest: Path
    settings: ExportConfig
    tally: Tally
    originals: Originals
    unselected: Callable[[], Iterator[pa.Table]]
    record: dict[str, Any]
    wording: Wording = AS_THEY_ARE


Write = Callable[[Iterator[pa.Table], Export], None]


@dataclass(frozen=True, slots=True)
class Format:
    """An export format.

    `supports_decorative`: an empty text means "decorative image" there, not "no text". `suffix`: added to a DEST
    without one, for formats that are one file.
    """

    write: Write
    supports_decorative: bool = False
    suffix: str = ""


def write_line(file: TextIO, value: dict[str, Any]) -> None:
    """Write one line of JSON."""
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_origin(file: TextIO, row: dict[str, Any], **location: Any) -> None:
    """Write a line with the provenance of a text, for formats that have no field for it."""
    write_line(file, {"image_id": row["image_id"], **location, "alt_text": row["alt_text"], **provenance(row)})
