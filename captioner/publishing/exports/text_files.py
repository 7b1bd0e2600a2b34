"""Export .txt files named like the images that hold only the text, as kohya's scripts, TagGUI and others read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    origins = Path(directory.path(f"exports/{ORIGINS}"))
    _settle(origins)  # an export that was killed
    written: set[int] = set()  # hashes of the paths that this export wrote
    with _new_lines(origins).open("w", encoding="utf-8") as lines:
        for rows in texts:
            to_write = [row for row in rows.to_pylist() if _is_to_be_written(row, export, written)]
            for row in to_write:
                write_origin(lines, row, path=str(_text_path(row)))
            lines.flush()
            os.fsync(lines.fileno())  # before the texts: none is ever without its line
            for row in to_write:
                _write_text_file(row, export)
        for rows in export.unselected() if export.settings.update else ():
            for row in rows.to_pylist():
                _withdraw(row, export)
    _settle(origins)


def _text_path(row: dict[str, Any]) -> Path:
    return with_suffix(Path(row["uri"]), ".txt")


def _is_to_be_written(row: dict[str, Any], export: Export, written: set[int]) -> bool:
    """Return whether a text gets its file, and note its path in `written`; the reason why not is tallied."""
    path = _text_path(row)
    if not Path(row["uri"]).is_file():
        export.tally.leave_out(row, "there is no such file on this disk to put a .txt beside")
    elif hash(str(path)) in written:
        export.tally.leave_out(row, f"another image has {path.name} too")
    elif path.exists() and export.settings.existing == "skip":
        export.tally.leave_out(row, "a .txt is there already (--existing overwrite or append)")
    else:
        written.add(hash(str(path)))
        return True
    return False


def _write_text_file(row: dict[str, Any], export: Export) -> None:
    path = _text_path(row)
    before = path.read_bytes() if path.exists() and export.settings.existing == "append" else b""
    replace_file(path, _appended(before, row["alt_text"]))


def _new_lines(origins: Path) -> Path:
    """Return the path of the lines that an export writes before its texts, until `_settle` moves them."""
    return origins.with_name(f"{ORIGINS}.new")


def _settle(origins: Path) -> None:
    """Move the lines of an export to those of earlier ones, each in place of an older one of the same .txt.

    A new line counts where its .txt holds the text: an export may be killed between them. A .txt that is gone has no
    line.
    """
    new = _new_lines(origins)
    moved = {hash(path) for path, text, _ in _lines_in(new) if _holds(Path(path), text)}
    with new_file(origins) as partial, partial.open("wb") as file:
        for path, _, line in _lines_in(origins):
            if hash(path) not in moved and Path(path).is_file():
                file.write(line)
        file.writelines(line for path, _, line in _lines_in(new) if hash(path) in moved)
    new.unlink(missing_ok=True)


def _lines_in(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield the path of a .txt, its text and the whole line; nothing of a line that a kill has cut."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                origin = json.loads(line)
                yield origin["path"], origin["alt_text"], line


def _holds(path: Path, text: str) -> bool:
    """Return whether a file has a text as lines of its own."""
    return path.is_file() and b"\n" + text.encode() + b"\n" in b"\n" + path.read_bytes() + b"\n"


def _appended(before: bytes, text: str) -> bytes:
    """Return the file with one more line, unless it has that line."""
    line = text.encode()
    if line in before.splitlines():
        return before
    return before + (b"\n" if before and not before.endswith(b"\n") else b"") + line + b"\n"


def _withdraw(row: dict[str, Any], export: Export) -> None:
    """Delete the file of a text that is no longer published, unless somebody has changed it."""
    path = _text_path(row)
    exported = export.wording.variants((row["alt_text"], row["caption"]))
    if path.is_file() and path.read_bytes().rstrip(b"\n") in exported:
        path.unlink()
        export.tally.withdrawn += 1
