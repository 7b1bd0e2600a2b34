""".txt files named like the pictures, the text alone in them: what kohya's scripts, TagGUI and others read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from captioner.errors import UsageError
from captioner.publishing.exports.context import Export, write_origin
from captioner.publishing.exports.destination import inside, new_file, new_folder, put, write_new
from captioner.publishing.exports.suffixes import beside

ORIGINS = "captioner-provenance.jsonl"


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """A .txt for each picture: in DEST under the name of its image id, or next to the picture itself.

    A .txt has no place for provenance: it is in captioner-provenance.jsonl, in DEST or in OUT/exports.
    """
    if export.settings.beside_originals:
        _write_beside(texts, export)
        return
    with new_folder(export.dest, export.record) as folder, (folder / ORIGINS).open("w", encoding="utf-8") as origins:
        for rows in texts:
            for row in rows.to_pylist():
                path = folder / beside(inside(row["image_id"]), ".txt")
                if path.exists():
                    export.tally.leave_out(row, f"another picture has {path.name} too")
                    continue
                write_new(path, _appended(b"", row["alt_text"]))
                write_origin(origins, row, path=path.relative_to(folder).as_posix())


def _write_beside(texts: Iterator[pa.Table], export: Export) -> None:
    directory = export.pictures.table.directory
    if not directory.is_local:
        raise UsageError(f"{directory.location}: .txt beside the originals needs OUT on a local disk; copy it to one")
    taken: set[int] = set()  # hashes of what this export wrote
    origins_path = Path(directory.path(f"exports/{ORIGINS}"))
    with new_file(origins_path) as partial, partial.open("w", encoding="utf-8") as origins:
        for rows in texts:
            for row in rows.to_pylist():
                _write_one(row, export, taken, origins)
        for rows in export.refused() if export.settings.update else ():
            for row in rows.to_pylist():
                _withdraw(row, export)


def _write_one(row: dict[str, Any], export: Export, taken: set[int], origins: TextIO) -> None:
    picture = Path(row["uri"])
    path = beside(picture, ".txt")
    if not picture.is_file():
        export.tally.leave_out(row, "there is no such file on this disk to put a .txt beside")
    elif hash(str(path)) in taken:
        export.tally.leave_out(row, f"another picture has {path.name} too")
    elif path.exists() and export.settings.existing == "skip":
        export.tally.leave_out(row, "a .txt is there already (--existing overwrite or append)")
    else:
        taken.add(hash(str(path)))
        before = path.read_bytes() if path.exists() and export.settings.existing == "append" else b""
        put(path, _appended(before, row["alt_text"]))
        write_origin(origins, row, path=str(path))


def _appended(before: bytes, text: str) -> bytes:
    """One more line, unless it is there."""
    line = text.encode()
    if line in before.splitlines():
        return before
    return before + (b"\n" if before and not before.endswith(b"\n") else b"") + line + b"\n"


def _withdraw(row: dict[str, Any], export: Export) -> None:
    """Delete what an earlier export wrote, where the text is published no longer; not what somebody has changed."""
    path = beside(Path(row["uri"]), ".txt")
    ours = (row["alt_text"], f"{row['alt_text']} {export.settings.automatic_mark}", row["caption"])
    if path.is_file() and path.read_bytes().rstrip(b"\n") in [text.encode() for text in ours if text]:
        path.unlink()
        export.tally.withdrawn += 1
