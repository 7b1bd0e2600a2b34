"""Read images from the cells of a table, which hold bytes, a path, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from captioner.data import RawImage
from captioner.sources.reading import ReadLimits, failed_read, raw_image, read_all, read_limits
from captioner.sources.root import RefusedFileError, Root, admitting, file_named_in


@dataclass(frozen=True, slots=True)
class FileCell:
    """A cell with the path or URI of a file; paths are relative to the source's root."""

    file: bytes


# The bytes, the file that has them, nothing, or why the row could not be read.
Cell = bytes | FileCell | None | OSError


def make_cell(value: Any, folder: bytes = b"") -> Cell:
    """Convert a value of an image column: bytes, text (a path), or struct{bytes, path}. `folder`: of the table."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if isinstance(value, str):
        return FileCell(file_named_in(folder, value)) if value else None
    return value if isinstance(value, bytes) else None  # else of a table that was rewritten after it was planned


def read_cells(rows: pa.Table, cells: Sequence[Cell], uris: Sequence[str], root: Root) -> list[RawImage]:
    """Return the image of each cell, in order; cells with a path are read from their files."""
    ids = rows.column("image_id").to_pylist()
    tasks = [partial(_read_cell, root, read_limits(), *arguments) for arguments in zip(ids, uris, cells, strict=True)]
    return read_all(tasks, root, in_archives=all(isinstance(cell, FileNotFoundError) for cell in cells))


def _read_cell(root: Root, limits: ReadLimits, image_id: str, uri: str, cell: Cell) -> RawImage:
    try:
        if isinstance(cell, FileCell):
            with admitting(limits.admit):
                cell = root.retry(partial(root.read, cell.file))
        elif isinstance(cell, bytes):
            limits.check(len(cell))
    except RefusedFileError as refused:
        return RawImage(image_id, uri, None, refused.code, refused.message)
    except OSError as error:
        cell = error
    if isinstance(cell, OSError):
        return failed_read(image_id, uri, cell)
    if cell is None:
        return RawImage(image_id, uri, None, "not_found", "the table has no image in this row")
    return raw_image(image_id, uri, cell)
