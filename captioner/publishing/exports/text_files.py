"""Export .txt files named like the images that hold only the text, as kohya's scripts, TagGUI and others read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from captioner.errors import UsageError
from captioner.publishing.exports.context import Export, write_origin
from captioner.publishing.exports.destination import new_file, new_folder, relative_path, replace_file, write_new
from captioner.publishing.exports.suffixes import with_suffix

ORIGINS = "captioner-provenance.jsonl"


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write a .txt for each image: in DEST, named after the image id, or next to the original image.

    A .txt cannot hold provenance: that goes to captioner-provenance.jsonl, in DEST or in OUT/exports.
    """
    if export.settings.beside_originals:
        _write_beside(texts, export)
        return
    with new_folder(export.dest, export.record) as folder, (folder / ORIGINS).open("w", encoding="utf-8") as origins:
        for rows in texts:
            for row in rows.to_pylist():
                path = folder / with_suffix(relative_path(row["image_id"]), ".txt")
                if path.exists():
                    export.tally.leave_out(row, f"another image has {path.name} too")
                    continue
                write_new(path, _appended(b"", row["alt_text"]))
                write_origin(origins, row, path=path.relative_to(folder).as_posix())


def _write_beside(texts: Iterator[pa.Table], export: Export) -> None:
    directory = export.originals.table.directory
    if not directory.is_local:
        raise UsageError(f"{directory.location}: --beside-originals needs OUT on a local disk; copy it to one")
    written: set[int] = set()  # hashes of the paths that this export wrote
    origins_path = Path(directory.path(f"exports/{ORIGINS}"))
    with new_file(origins_path) as partial, partial.open("w", encoding="utf-8") as origins:
        for rows in texts:
            for row in rows.to_pylist():
                _write_text_file(row, export, written, origins)
        for rows in export.unselected() if export.settings.update else ():
            for row in rows.to_pylist():
                _withdraw(row, export)


def _write_text_file(row: dict[str, Any], export: Export, written: set[int], origins: TextIO) -> None:
    image = Path(row["uri"])
    path = with_suffix(image, ".txt")
    if not image.is_file():
        export.tally.leave_out(row, "there is no such file on this disk to put a .txt beside")
    elif hash(str(path)) in written:
        export.tally.leave_out(row, f"another image has {path.name} too")
    elif path.exists() and export.settings.existing == "skip":
        export.tally.leave_out(row, "a .txt is there already (--existing overwrite or append)")
    else:
        written.add(hash(str(path)))
        before = path.read_bytes() if path.exists() and export.settings.existing == "append" else b""
        replace_file(path, _appended(before, row["alt_text"]))
        write_origin(origins, row, path=str(path))


def _appended(before: bytes, text: str) -> bytes:
    """Return the file with one more line, unless it has that line."""
    line = text.encode()
    if line in before.splitlines():
        return before
    return before + (b"\n" if before and not before.endswith(b"\n") else b"") + line + b"\n"


def _withdraw(row: dict[str, Any], export: Export) -> None:
    """Delete the file of a text that is no longer published, unless somebody has changed it."""
    path = with_suffix(Path(row["uri"]), ".txt")
    exported = export.wording.variants((row["alt_text"], row["caption"]))
    if path.is_file() and path.read_bytes().rstrip(b"\n") in exported:
        path.unlink()
        export.tally.withdrawn += 1
