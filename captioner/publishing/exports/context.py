"""What the function of a form is given besides the texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.publishing.exports.originals import Pictures
from captioner.publishing.exports.select import Tally, provenance


@dataclass(frozen=True)
class Export:
    """`dest` is a path that may be written. `refused`: the texts that are not chosen, for taking them back.
    `record`: what to keep about the export in its folder."""

    dest: Path
    settings: ExportConfig
    tally: Tally
    pictures: Pictures
    refused: Callable[[], Iterator[pa.Table]]
    record: dict[str, Any]


Write = Callable[[Iterator[pa.Table], Export], None]


@dataclass(frozen=True, slots=True)
class Form:
    """`says_decorative`: an empty text means "decorative" there and not "no text"."""

    write: Write
    says_decorative: bool = False


def write_line(file: TextIO, value: dict[str, Any]) -> None:
    """One line of JSON."""
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_origin(file: TextIO, row: dict[str, Any], **where: Any) -> None:
    """A line that says where a text comes from, for forms that have no place for it."""
    write_line(file, {"image_id": row["image_id"], **where, "alt_text": row["alt_text"], **provenance(row)})
